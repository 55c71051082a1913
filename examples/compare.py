"""Train attention, HGRN2 and a hybrid of the two with the same flags, except those that name the layers.

    python examples/compare.py [--size 1b] [--models attention HGRN2]

HGRN2 and the hybrid are HybridModels. Attention is a GPT, because Megatron's own layers of a HybridModel need
Transformer Engine. The two forms are the same function: a layer of a GPT is two layers of a HybridModel.

The three models train on the bytes of Python's standard library. The script draws their training losses and their
held-out bits per byte in compare/loss.png, and keeps the logs in compare/. The size "small" runs on any machine. The
size "1b" has 24 layers of 2048 channels and sequences of 4096 tokens, and needs an 80 GB GPU with Transformer Engine.
"""

import argparse
import shutil
from pathlib import Path

import matplotlib
import prepare_bytes
from training_log import TrainingLog, bits, device_flags, train

FOLDER = Path("compare")
ITERATIONS, HELDOUT_FRACTION = 200, 0.01
# a point of the drawn curve is the mean of this many iterations
SMOOTH = 20

ATTENTION = "attention"
# name -> the layers of a HybridModel, repeated over its depth: M is HGRN2, * is attention and - is an MLP
MODELS = {ATTENTION: "*-", "HGRN2": "M-", "hybrid M-M-M-*-": "M-M-M-*-"}
# Attention layers use rotary embeddings. HGRN2 layers use no positions.
BLOCK = (
    "--normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu --hidden-dropout 0 "
    "--attention-dropout 0 --position-embedding-type rope"
)
# size -> the depth, as the number of layers of a GPT, and the flags of the model and its training
SIZES = {
    "small": (
        4,
        "--hidden-size 256 --ffn-hidden-size 768 --num-attention-heads 4 --hgrn2-expand-ratio 64 "
        "--seq-length 256 --max-position-embeddings 256 --micro-batch-size 8 --global-batch-size 8 "
        "--lr 2e-3 --min-lr 1e-4",
    ),
    "1b": (
        24,
        "--hidden-size 2048 --ffn-hidden-size 5632 --num-attention-heads 16 "
        "--seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 2 --global-batch-size 2 "
        "--lr 3e-4 --min-lr 3e-5 --use-distributed-optimizer --no-gradient-accumulation-fusion",
    ),
}
TRAINING = f"--train-iters {ITERATIONS} --lr-decay-style cosine --lr-warmup-iters 10 --adam-beta2 0.95"
# one evaluation at the end; quickstart.py says why it needs --multiple-validation-sets
EVALUATION = f"--full-validation --multiple-validation-sets --eval-interval {ITERATIONS + 1}"


def start_clean() -> None:
    FOLDER.mkdir(exist_ok=True)
    shutil.rmtree(FOLDER / "data", ignore_errors=True)
    for path in (*FOLDER.glob("*.log"), FOLDER / "loss.png"):
        path.unlink(missing_ok=True)


def layers(model: str, depth: int) -> tuple[str, list[str]]:
    """Return the script that trains a model, and the flags in which the model differs from the others.

    Args:
        model: its name in MODELS.
        depth: number of layers, each with a mixer and an MLP.
    """
    if model == ATTENTION:
        return "pretrain_gpt.py", ["--num-layers", str(depth)]
    pattern = MODELS[model] * (2 * depth // len(MODELS[model]))
    return "pretrain_hybrid.py", ["--spec", "hgrn2_stack", "--hybrid-layer-pattern", pattern]


def smooth(losses: dict[int, float]) -> tuple[list[int], list[float]]:
    """Return iterations and, for each, the mean in bits of the last `SMOOTH` losses up to it."""
    iterations, values = list(losses), list(losses.values())
    ends = range(SMOOTH, len(values) + 1)
    return iterations[SMOOTH - 1 :], [bits(sum(values[end - SMOOTH : end]) / SMOOTH) for end in ends]


def draw(runs: dict[str, TrainingLog], bigram: float) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, run in runs.items():
        heldout = bits(run.heldout[ITERATIONS])
        (line,) = axes.plot(*smooth(run.losses), label=f"{name}: {heldout:.3f} on held-out files")
        axes.plot(ITERATIONS, heldout, "o", color=line.get_color())
    axes.axhline(bigram, color="gray", ls="--", label=f"bigram model: {bigram:.3f} on held-out files")
    axes.set(
        xlabel="iteration",
        ylabel="bits per byte",
        title=f"Training loss (mean of {SMOOTH} iterations), held-out loss (dots)",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=120)


def table(runs: dict[str, TrainingLog]) -> str:
    """Return a table with one line per model. Tokens/s is the speed of the median iteration."""
    lines = [f"{'model':16}{'parameters':>12}{'held-out bits per byte':>24}{'tokens/s':>10}"]
    for name, run in runs.items():
        heldout, speed = bits(run.heldout[ITERATIONS]), run.tokens_per_second()
        lines.append(f"{name:16}{run.parameters:12,}{heldout:24.3f}{speed:10,.0f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the models; 1b needs an 80 GB GPU")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to train")
    args = parser.parse_args()
    start_clean()
    splits = prepare_bytes.prepare(
        out=FOLDER / "data", heldout_fraction=HELDOUT_FRACTION, **prepare_bytes.standard_library()
    )
    bigram, summary = prepare_bytes.describe(*splits)
    print(summary)
    depth, size = SIZES[args.size]
    flags = [*f"{size} {BLOCK} {TRAINING} {EVALUATION}".split(), *prepare_bytes.megatron_flags(*splits)]
    runs = {}
    for name in args.models:
        script, difference = layers(name, depth)
        print(f"\n{name}: {script} {' '.join(difference)}", flush=True)
        log = FOLDER / f"{name.split()[0].lower()}.log"
        runs[name] = train([*difference, *flags, *device_flags()], log, every=20, script=script)
    draw(runs, bigram)
    print(f"\n{table(runs)}\nbigram model: {bigram:.3f}\nloss curves: {FOLDER}/loss.png")


if __name__ == "__main__":
    main()
