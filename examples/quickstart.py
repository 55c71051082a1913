"""Pretrain a small HGRN2 model on this machine and check what it learned. No GPU is needed.

    python examples/quickstart.py

The script trains on the bytes of Python's standard library and saves two checkpoints. It resumes from the earlier
checkpoint and compares every loss with the uninterrupted run. It compares the held-out loss with the loss of a bigram
model, and it writes a sample. All of this takes a few minutes on two CPU cores. The results are in quickstart/:
train.log, resume.log, generate.log, checkpoints and loss.png.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import prepare_bytes
from training_log import LAUNCH, TrainingLog, bits, device_flags, environment, first_difference, train

FOLDER = Path("quickstart")
# files and folders that a run writes, and that the next run deletes
OUTPUTS = ("data", "checkpoints", "train.log", "resume.log", "generate.log", "loss.png")
ITERATIONS, SAVE_INTERVAL, EVAL_INTERVAL = 200, 160, 110
HELDOUT_FRACTION = 0.01

MODEL = (
    "--spec hgrn2_stack --hybrid-layer-pattern M-M-M-M- --hidden-size 256 --num-attention-heads 4 "
    "--hgrn2-expand-ratio 64 --seq-length 256 --max-position-embeddings 256"
)
TRAINING = (
    f"--micro-batch-size 8 --global-batch-size 8 --train-iters {ITERATIONS} --lr 2e-3 --min-lr 1e-4 "
    "--lr-decay-style cosine --lr-warmup-iters 10 --adam-beta2 0.95"
)
# Each evaluation reads all held-out tokens. Megatron 0.19 can do that only with --multiple-validation-sets.
EVALUATION = f"--full-validation --multiple-validation-sets --eval-interval {EVAL_INTERVAL}"


def start_clean():
    FOLDER.mkdir(exist_ok=True)
    for name in OUTPUTS:
        path = FOLDER / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def prepare() -> tuple[list[str], float]:
    """Build the datasets. Return Megatron's flags for them and the bigram model's held-out bits per byte."""
    print("Reading Python's standard library as bytes", flush=True)
    source = prepare_bytes.standard_library()
    splits = prepare_bytes.prepare(out=FOLDER / "data", heldout_fraction=HELDOUT_FRACTION, **source)
    bigram, summary = prepare_bytes.describe(*splits)
    print(summary, flush=True)
    return prepare_bytes.megatron_flags(*splits), bigram


def draw(full: TrainingLog, resumed: TrainingLog, bigram: float):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for losses, style in (
        (full.losses, {"lw": 1, "label": "training"}),
        (resumed.losses, {"lw": 5, "alpha": 0.4, "label": "training, resumed"}),
        (full.heldout, {"ls": "", "marker": "o", "color": "black", "label": "held-out files"}),
    ):
        axes.plot(list(losses), [bits(loss) for loss in losses.values()], **style)
    axes.axhline(bigram, color="gray", ls="--", label="bigram model, held-out files")
    axes.set(xlabel="iteration", ylabel="bits per byte", title="HGRN2 on the bytes of Python's library")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "loss.png", dpi=120)


def write_sample():
    """Continue a line with the last checkpoint. This runs generate.py in a process of its own, as a user would."""
    script = str(Path(__file__).with_name("generate.py"))
    flags = [
        *f"--load {FOLDER / 'checkpoints'} --use-checkpoint-args --max-new-tokens 200".split(),
        "--prompt",
    ]
    command = [sys.executable, *LAUNCH, script, *flags, "def ", *device_flags()]
    with open(FOLDER / "generate.log", "w") as log:
        if subprocess.run(command, stderr=log, env=environment()).returncode:
            sys.exit(f"generation failed; its whole output is in {log.name}")


def main():
    start = time.monotonic()
    start_clean()
    data, bigram = prepare()
    common = [*MODEL.split(), *TRAINING.split(), *EVALUATION.split(), *data, *device_flags()]
    checkpoints = str(FOLDER / "checkpoints")

    print(f"\nTraining. The whole log is in {FOLDER}/train.log", flush=True)
    full = train([*common, "--save", checkpoints, "--save-interval", str(SAVE_INTERVAL)], FOLDER / "train.log")

    print(f"\nResuming from the checkpoint of iteration {SAVE_INTERVAL}", flush=True)
    load = ["--load", checkpoints, "--ckpt-step", str(SAVE_INTERVAL), "--exit-on-missing-checkpoint"]
    resumed = train([*common, *load], FOLDER / "resume.log")
    draw(full, resumed, bigram)

    print("\nA sample from the trained model", flush=True)
    write_sample()

    difference = first_difference(full, resumed)
    equal = f"all {len(resumed.losses)} training losses and the held-out loss equal those of the first run"
    heldout = bits(full.heldout[ITERATIONS])
    print(f"\nHGRN2, {full.parameters:,} parameters, after {time.monotonic() - start:.0f} s")
    print(f"held-out files: HGRN2 {heldout:.3f}, bigram model {bigram:.3f} bits per byte")
    print(f"resumed at {SAVE_INTERVAL}: {difference or equal}")
    print(f"loss curve: {FOLDER}/loss.png")
    if difference:
        sys.exit("the losses of the resumed run differ from the uninterrupted run")
    if heldout >= bigram:
        sys.exit("HGRN2 is no better than the bigram model")


if __name__ == "__main__":
    main()
