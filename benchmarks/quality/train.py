"""Train one model through Megatron's loop, with everything but the mixer equal.

    python benchmarks/quality/train.py MODEL --data data --out runs [--lr 1e-3] [--seed 1] [--minutes 9] [-- more flags]

MODEL is a name from the table MODELS below. All models share one list of flags for the block, the data and their order,
and the schedule. tokens.py makes the data.

All models have the same number of parameters, up to half a percent, and the log of each run states it. HGRN2 has as
many as attention at every expand ratio: a smaller ratio only divides the same projections into more heads. Without
lower bounds, HGRN2 lacks their table of one row per layer. Mixers with more parameters get a narrower GLU.

With --until the program gives up after 60 iterations if the other iterations would not end by that time.

With --minutes the program stops after that time and writes a checkpoint. Call it again, and it continues from its last
checkpoint until it prints "done". Each call writes its log to runs/MODEL-lr-seed/, where draw.py reads it.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

POSITIONS, GATES = "positions.json", "gates.json"
# After so many iterations, the speed of a run is known.
SURE = 60
ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

from runs import parse  # noqa: E402
from training_log import LAUNCH, TrainingLog, bits, device_flags, run_lines  # noqa: E402

BLOCK = (
    "--normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu --hidden-dropout 0 "
    "--attention-dropout 0 --position-embedding-type {positions} --cross-entropy-loss-fusion "
    # The fusion of gradient accumulation needs Apex in attention's output layer. Causal attention needs no mask tensor.
    "--no-gradient-accumulation-fusion --no-create-attention-mask-in-dataloader"
)
GDN = (
    "--experimental-attention-variant gated_delta_net --linear-num-key-heads {heads} --linear-num-value-heads {heads} "
    "--linear-key-head-dim {head} --linear-value-head-dim {head}"
)
MAMBA = "--spec megatron.core.models.hybrid.hybrid_layer_specs hybrid_stack_spec --mamba-num-groups 1"
HGRN2 = "--spec hgrn2 --hgrn2-expand-ratio {head}"


@dataclasses.dataclass(frozen=True)
class Model:
    """The settings in which a model differs from the others.

    Attributes:
        title: the name in tables and pictures.
        flags: Megatron's flags of the mixers. Names in braces stand for values of the size.
        more: a and b, if a layer's mixer has a * hidden^2 + b * hidden more parameters than attention.
        runner: flags of megatron_run.py.
        positions: positions in the attention layers, as --position-embedding-type names them.
    """

    title: str
    flags: str = ""
    more: tuple[float, float] = (0, 0)
    runner: tuple[str, ...] = ()
    positions: str = "rope"


MODELS = {
    # The mixers. A plain name is the form that the ablations change. A hybrid's fourth layers have attention.
    "attention": Model("attention"),
    "hgrn2": Model("HGRN2", HGRN2),
    "hybrid": Model("HGRN2 hybrid", f"{HGRN2} --hgrn2-layer-pattern HHH*"),
    "gdn": Model("gated delta net", f"{GDN} --linear-attention-freq {{layers}}", (1, 0)),
    "gdn-hybrid": Model("gated delta net hybrid", f"{GDN} --linear-attention-freq 4", (0.75, 0)),
    # Its mixer has 2 * hidden channels, a state of 128 and heads of 64 channels.
    "mamba2": Model("Mamba2", f"{MAMBA} --hybrid-layer-pattern {{mamba}}", (2 + 1 / 32, 2 * 128), ("--hybrid-model",)),
    "mamba2-hybrid": Model(
        "Mamba2 hybrid", f"{MAMBA} --hybrid-layer-pattern {{mamba_hybrid}}", (1.5 + 3 / 128, 192), ("--hybrid-model",)
    ),
    # Forget gates without lower bounds.
    "hgrn2-no-bounds": Model("HGRN2 without lower bounds", f"{HGRN2} --hgrn2-lower-bounds none"),
    # Other states. At the size 125m, hgrn2 has the expand ratio 128.
    "hgrn2-expand-16": Model("HGRN2, expand ratio 16", "--spec hgrn2 --hgrn2-expand-ratio 16"),
    "hgrn2-expand-32": Model("HGRN2, expand ratio 32", "--spec hgrn2 --hgrn2-expand-ratio 32"),
    "hgrn2-expand-64": Model("HGRN2, expand ratio 64", "--spec hgrn2 --hgrn2-expand-ratio 64"),
    "hgrn2-expand-256": Model("HGRN2, expand ratio 256", "--spec hgrn2 --hgrn2-expand-ratio 256"),
    # Other numbers of HGRN2 layers for each attention layer
    "hybrid-1-1": Model("HGRN2 hybrid 1:1", f"{HGRN2} --hgrn2-layer-pattern H*"),
    "hybrid-5-1": Model("HGRN2 hybrid 5:1", f"{HGRN2} --hgrn2-layer-pattern HHHHH*"),
    "hybrid-7-1": Model("HGRN2 hybrid 7:1", f"{HGRN2} --hgrn2-layer-pattern HHHHHHH*"),
    # Attention layers that know positions only from the recurrent layers below them
    "hybrid-no-positions": Model(
        "HGRN2 hybrid without positions", f"{HGRN2} --hgrn2-layer-pattern HHH*", positions="none"
    ),
    "gdn-hybrid-no-positions": Model(
        "gated delta net hybrid without positions", f"{GDN} --linear-attention-freq 4", (0.75, 0), positions="none"
    ),
    # Rotary positions with the base of Llama 3. The other models have Megatron's default, 10,000.
    "hybrid-rotary-base": Model(
        "HGRN2 hybrid, rotary base 500,000", f"{HGRN2} --hgrn2-layer-pattern HHH* --rotary-base 500000"
    ),
    # The model hgrn2 with the same first weights, computed by flash-linear-attention.
    "hgrn2-fla": Model("HGRN2 of fla", HGRN2, runner=("--fla",)),
}
# layers, hidden size, attention heads, expand ratio, sequence, micro-batch, batch, iterations, vocabulary's multiple
SIZES = {
    "125m": dict(layers=12, hidden=768, attention_heads=12, head=128, seq=2048, micro=32, batch=64, iterations=2400),
    # 16 layers, because 12 layers cannot have 7 HGRN2 layers for each attention layer.
    "100m": dict(layers=16, hidden=640, attention_heads=10, head=128, seq=2048, micro=32, batch=64, iterations=2400),
    "tiny": dict(layers=4, hidden=64, attention_heads=2, head=32, seq=64, micro=8, batch=8, iterations=60),
    # Small enough for Triton's interpreter, which takes about a second for an iteration.
    "toy": dict(layers=2, hidden=32, attention_heads=2, head=16, seq=16, micro=2, batch=2, iterations=8),
}
TRAINING = "--lr-decay-style cosine --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0"


def glu_width(model: str, hidden: int) -> int:
    """Return the width of the GLU with which a model's layers have as many parameters as attention's.

    Attention and HGRN2 have 4 hidden^2 parameters a layer and a GLU of 8/3 of the hidden size. Gated delta net's mixer
    has as many channels as the hidden size, and 5 hidden^2 parameters. Mamba2's mixer has 6 hidden^2 and about 280
    hidden. This count leaves out convolutions. The GLU has 3 hidden parameters per channel, and it gets narrower by the
    parameters that the mixer has more.

    Raises:
        KeyError: the model is unknown.
    """
    squares, singles = MODELS[model].more
    # Tensor cores work best with multiples of 16.
    return round((hidden * 8 // 3 - (squares * hidden + singles) / 3) / 16) * 16


def mixer_flags(model: str, size: str) -> list[str]:
    """Return Megatron's flags of a model's mixers.

    Raises:
        ValueError: this size cannot have such mixers.
    """
    s = SIZES[size]
    layers, hidden = s["layers"], s["hidden"]
    words = dict(
        heads=hidden // s["head"],
        head=s["head"],
        layers=f"[1]*{layers}",
        mamba="M-" * layers,
        mamba_hybrid="M-M-M-*-" * (layers // 4),
    )
    flags = MODELS[model].flags.format(**words).split()
    given = dict(zip(flags, flags[1:], strict=False))
    pattern, ratio = given.get("--hgrn2-layer-pattern", "H"), int(given.get("--hgrn2-expand-ratio", 1))
    repeats = 4 if model == "mamba2-hybrid" else len(pattern)
    if layers % repeats:
        fits = [name for name in SIZES if SIZES[name]["layers"] % repeats == 0]
        raise ValueError(
            f"{model} repeats {repeats} layers, and the size {size} has {layers}: give --size {' or '.join(fits)}"
        )
    if hidden % ratio:
        raise ValueError(
            f"{model} has heads of {ratio} channels, which do not divide the {hidden} channels of the size {size}: "
            "give another model or another --size"
        )
    return flags


def check_packages(model: str):
    """Check that the packages of a model are there, before anything starts.

    Raises:
        ValueError: the model is fla's, and fla is missing.
    """
    if "--fla" in MODELS[model].runner and importlib.util.find_spec("fla") is None:
        raise ValueError(
            f"{model} needs fla, which is missing: pip install flash-linear-attention==0.6.0, or put a folder with it "
            "and fla-core 0.6.0 into PYTHONPATH"
        )


def flags_of(
    model: str, size: str, data: Path, lr: float, seed: int, iterations: int | None, evaluations: int
) -> list[str]:
    """Return Megatron's flags of a run, without the paths of its checkpoints and the time of its end.

    Raises:
        ValueError: this size cannot have such mixers.
    """
    s = SIZES[size]
    iterations = iterations or s["iterations"]
    vocab = json.loads((data / "data.json").read_text())["vocab"]
    difference = mixer_flags(model, size)
    layers = "" if "--hybrid-layer-pattern" in difference else f"--num-layers {s['layers']}"
    shape = f"""
        {layers} --hidden-size {s["hidden"]} --ffn-hidden-size {glu_width(model, s["hidden"])}
        --num-attention-heads {s["attention_heads"]} --seq-length {s["seq"]} --max-position-embeddings {s["seq"]}
        --micro-batch-size {s["micro"]} --global-batch-size {s["batch"]} --train-iters {iterations}
        --lr {lr:g} --min-lr {lr / 10:g} --lr-warmup-iters {max(1, iterations // 20)} --seed {seed}
        --eval-interval {max(1, iterations // evaluations)} --eval-iters 1
        --make-vocab-size-divisible-by 64 --vocab-size {vocab} --tokenizer-type NullTokenizer
    """
    paths = ["--train-data-path", str(data / "train"), "--valid-data-path", str(data / "heldout-sample")]
    block = BLOCK.format(positions=MODELS[model].positions)
    return [*difference, *f"{block} {TRAINING} {shape}".split(), *paths]


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
        ValueError: the folder has a run with other flags, this size cannot have such mixers, or fla is missing.
        SystemExit: Megatron failed.
    """
    check_packages(args.model)
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
        # a piece may have flags of its own, such as one that ends it
        "more flags": " ".join(args.extra),
    }
    about = folder / "run.json"
    if about.exists() and json.loads(about.read_text()) | {"more flags": run["more flags"]} != run:
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
    flags += MODELS[args.model].runner
    if "--fla" in flags and not torch.cuda.is_available():
        # Megatron imports parts of fla before megatron_run.py starts, and they need a GPU or the interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
    script = Path(__file__).with_name("megatron_run.py")
    log = folder / f"piece.{len(logs(folder))}.log"
    piece = TrainingLog(seq_length=run["seq_length"])
    for line in run_lines([sys.executable, *LAUNCH, str(script), *flags, *args.extra], log):
        known = len(piece.heldout)
        iteration = piece.read(line)
        if iteration and len(piece.losses) == SURE and args.until:
            give_up_if_late(piece, args.until)
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


def give_up_if_late(log: TrainingLog, until: float):
    """Stop if the iterations of a run would not end by a time, in seconds since 1970.

    Raises:
        SystemExit: they would end later.
    """
    speed = statistics.median(list(log.milliseconds.values())[-SURE // 2 :]) / 1000
    late = time.time() + speed * (log.last - max(log.losses)) - until
    if late > 0:
        sys.exit(f"at {speed:.2f} seconds for an iteration, the last one would end {late:.0f} seconds too late")


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
    parser.add_argument("--until", type=float, help="give up if it would be too late, in seconds since 1970")
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
