"""Train one of six models through Megatron's loop, with everything but the mixer equal.

    python benchmarks/quality/train.py MODEL --data data --out runs [--lr 1e-3] [--seed 1] [--minutes 9] [-- more flags]

MODEL is attention, hgrn2, hybrid (HHH*), gdn (gated delta net), gdn-hybrid (three of four layers) or mamba2. All models
share one list of flags for the block, the data and their order, and the schedule. The width of the GLU makes the
models' numbers of parameters equal, and the log states them. tokens.py makes the data.

With --minutes the program stops after that time and writes a checkpoint. Call it again, and it continues from its last
checkpoint until it prints "done". Each call writes its log to runs/MODEL-lr-seed/, where draw.py reads it.
"""

import argparse
import json
import sys
from pathlib import Path

POSITIONS = "positions.json"
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

from runs import parse  # noqa: E402
from training_log import LAUNCH, TrainingLog, bits, device_flags, run_lines  # noqa: E402

BLOCK = (
    "--normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu --hidden-dropout 0 "
    "--attention-dropout 0 --position-embedding-type rope --cross-entropy-loss-fusion "
    # The fusion of gradient accumulation needs Apex in attention's output layer. Causal attention needs no mask tensor.
    "--no-gradient-accumulation-fusion --no-create-attention-mask-in-dataloader"
)
GDN = (
    "--experimental-attention-variant gated_delta_net --linear-num-key-heads {heads} --linear-num-value-heads {heads} "
    "--linear-key-head-dim {head} --linear-value-head-dim {head}"
)
MAMBA = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --mamba-num-groups 1"
# The flags in which the models differ. HGRN2 layers have {heads} heads of {head} channels.
MODELS = {
    "attention": "",
    "hgrn2": "--spec hgrn2 --hgrn2-expand-ratio {head}",
    "hybrid": "--spec hgrn2 --hgrn2-expand-ratio {head} --hgrn2-layer-pattern HHH*",
    "gdn": f"{GDN} --linear-attention-freq {{layers}}",
    "gdn-hybrid": f"{GDN} --linear-attention-freq 4",
    "mamba2": f"{MAMBA} --hybrid-layer-pattern {{mamba}}",
}
# layers, hidden size, attention heads, expand ratio, sequence, micro-batch, batch, iterations, vocabulary's multiple
SIZES = {
    "125m": dict(layers=12, hidden=768, attention_heads=12, head=128, seq=2048, micro=16, batch=64, iterations=2400),
    "tiny": dict(layers=4, hidden=64, attention_heads=2, head=32, seq=64, micro=8, batch=8, iterations=60),
}
TRAINING = "--lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"


def glu_width(model: str, hidden: int) -> int:
    """Return the width of the GLU with which a model's layers have as many parameters as attention's.

    Attention and HGRN2 have 4 hidden^2 parameters a layer and a GLU of 8/3 of the hidden size. Gated delta net's mixer
    has as many channels as the hidden size, and 5 hidden^2 parameters. Mamba2's mixer has twice as many channels, a
    state of 128 and heads of 64, which makes 6 hidden^2 and about 280 hidden. This count leaves out convolutions. The
    GLU has 3 hidden parameters per channel, and it gets narrower by the parameters that the mixer has more.

    Raises:
        KeyError: the model is unknown.
    """
    wide = hidden * 8 // 3
    more = {
        "attention": 0,
        "hgrn2": 0,
        "hybrid": 0,
        "gdn": hidden**2,
        "gdn-hybrid": hidden**2 * 3 // 4,
        "mamba2": 2 * hidden**2 + hidden * (2 * 128 + hidden // 32),
    }[model]
    # Tensor cores work best with multiples of 16.
    return round((wide - more / (3 * hidden)) / 16) * 16


def flags_of(
    model: str, size: str, data: Path, lr: float, seed: int, iterations: int | None, evaluations: int
) -> list[str]:
    """Return Megatron's flags of a run, without the paths of its checkpoints and the time of its end."""
    s = SIZES[size]
    iterations = iterations or s["iterations"]
    vocab = json.loads((data / "data.json").read_text())["vocab"]
    pattern = "M-" * s["layers"]
    difference = MODELS[model].format(
        heads=s["hidden"] // s["head"], head=s["head"], layers=f"[1]*{s['layers']}", mamba=pattern
    )
    layers = "" if model == "mamba2" else f"--num-layers {s['layers']}"
    shape = f"""
        {layers} --hidden-size {s["hidden"]} --ffn-hidden-size {glu_width(model, s["hidden"])}
        --num-attention-heads {s["attention_heads"]} --seq-length {s["seq"]} --max-position-embeddings {s["seq"]}
        --micro-batch-size {s["micro"]} --global-batch-size {s["batch"]} --train-iters {iterations}
        --lr {lr:g} --min-lr {lr / 10:g} --lr-warmup-iters {max(1, iterations // 20)} --seed {seed}
        --eval-interval {max(1, iterations // evaluations)} --eval-iters 1
        --make-vocab-size-divisible-by 64 --vocab-size {vocab} --tokenizer-type NullTokenizer
    """
    paths = ["--train-data-path", str(data / "train"), "--valid-data-path", str(data / "heldout-sample")]
    return [*f"{difference} {BLOCK} {TRAINING} {shape}".split(), *paths]


def run_folder(out: Path, model: str, lr: float, seed: int) -> Path:
    return out / f"{model}-{lr:g}-seed{seed}"


def logs(folder: Path) -> list[Path]:
    """Return the logs of a run's pieces, in their order."""
    return sorted(folder.glob("piece.*.log"), key=lambda path: int(path.suffixes[0][1:]))


def merged(folder: Path, seq_length: int) -> TrainingLog:
    """Return the numbers of all pieces of a run. Where two pieces have the same iteration, the later piece counts."""
    whole = TrainingLog(seq_length=seq_length)
    for path in logs(folder):
        piece = TrainingLog(seq_length=seq_length)
        for line in path.read_text(errors="replace").splitlines():
            piece.read(line)
        whole.losses |= piece.losses
        whole.milliseconds |= piece.milliseconds
        whole.heldout |= piece.heldout
        whole.last, whole.batch = piece.last or whole.last, piece.batch or whole.batch
        whole.parameters = piece.parameters or whole.parameters
    return whole


def is_done(log: TrainingLog) -> bool:
    """Return whether a run has its last iteration and the held-out loss after it."""
    return bool(log.losses) and max(log.losses) == log.last and log.last in log.heldout


def train(args: argparse.Namespace) -> bool:
    """Train a piece of a run, and return whether the run is done.

    Raises:
        ValueError: the folder has a run with other flags.
        SystemExit: Megatron failed.
    """
    folder = run_folder(args.out, args.model, args.lr, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    settings = (args.model, args.size, args.data, args.lr, args.seed, args.iterations, args.evaluations)
    flags = [*flags_of(*settings), *device_flags()]
    run = {
        "model": args.model,
        "size": args.size,
        "lr": args.lr,
        "seed": args.seed,
        "seq_length": SIZES[args.size]["seq"],
        "data": json.loads((args.data / "data.json").read_text()),
        "flags": " ".join(flags),
    }
    about = folder / "run.json"
    if about.exists() and json.loads(about.read_text()) != run:
        raise ValueError(f"{folder} has a run with other flags or data: give another --out, or delete the folder")
    about.write_text(json.dumps(run, indent=1) + "\n")
    # Each run has an index of its own. Otherwise a run could read one that another run is still writing.
    flags += ["--held-out", str(args.data / "heldout-sample")]
    flags += ["--log-interval", "1", "--data-cache-path", str(folder / "index")]
    if args.checkpoints:
        checkpoints = str(folder / "checkpoints")
        flags += ["--save", checkpoints, "--load", checkpoints, "--save-interval", "1000000"]
    if args.minutes:
        flags += ["--exit-duration-in-mins", str(args.minutes)]
    if args.lengths:
        lengths = map(str, args.lengths)
        flags += ["--measure", str(args.data / "heldout"), "--lengths", *lengths, "--report", str(folder / POSITIONS)]
    if args.turn:
        flags += ["--turn", str(args.turn)]
    if args.model == "mamba2":
        flags += ["--hybrid-model"]
    script = Path(__file__).with_name("megatron_run.py")
    log = folder / f"piece.{len(logs(folder))}.log"
    piece = TrainingLog(seq_length=run["seq_length"])
    for line in run_lines([sys.executable, *LAUNCH, str(script), *flags, *args.extra], log):
        known = len(piece.heldout)
        iteration = piece.read(line)
        if line.startswith(("HGRN2", "hgrn2_megatron:")):
            print(line, flush=True)
        elif iteration and iteration % args.every == 0:
            speed = piece.tokens_per_second(piece.milliseconds[iteration])
            print(
                f"{args.model} {iteration}/{piece.last}: {piece.losses[iteration]:.4f}, {speed:,.0f} tokens/s",
                flush=True,
            )
        elif len(piece.heldout) > known:
            at = max(piece.heldout)
            print(f"{args.model} {at}/{piece.last}: held-out {bits_per_byte(piece.heldout[at], run):.4f} bits per byte")
    return is_done(merged(folder, run["seq_length"]))


def bits_per_byte(loss: float, run: dict, dataset: str = "heldout-sample") -> float:
    """Return a held-out loss in nats per token as bits per byte of the text of a dataset of tokens.py."""
    counts = run["data"][dataset]
    return bits(loss) * counts["tokens"] / counts["bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--data", type=Path, required=True, help="folder that tokens.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate; the last one is a tenth of it")
    parser.add_argument("--seed", type=int, default=1, help="seed of the weights and of the data's order")
    parser.add_argument("--iterations", type=int, help="length of the whole training, not of a piece")
    parser.add_argument("--evaluations", type=int, default=8, help="held-out losses, at equal distances")
    parser.add_argument("--minutes", type=int, help="stop after this time and write a checkpoint")
    parser.add_argument("--checkpoints", action=argparse.BooleanOptionalAction, default=True, help="write checkpoints")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="at the end, measure losses by position in sequences of these lengths"
    )
    parser.add_argument("--turn", type=Path, help="wait for the lock on this file before training")
    parser.add_argument("--every", type=int, default=50, help="iterations from one printed line to the next")
    args = parse(parser)
    try:
        done = train(args)
    except ValueError as error:
        parser.error(str(error))
    print("done" if done else "not done: call it again")


if __name__ == "__main__":
    main()
