"""Start Megatron through the plugin's launcher, and read losses and times from its log."""

import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

LAUNCH = "-m torch.distributed.run --standalone --nproc_per_node 1 -m hgrn2_megatron".split()

_ITERATION = re.compile(
    r"iteration +(?P<iteration>\d+)/ *(?P<last>\d+) \|.* elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|"
    r".* global batch size: +(?P<batch>\d+) \|.* lm loss: (?P<loss>[\d.E+-]+) \|"
)
_HELDOUT = re.compile(r"validation\S* loss at iteration (?P<iteration>\d+).* \| lm loss value: (?P<loss>[\d.E+-]+)")
_PARAMETERS = re.compile(r"number of parameters on .*: (?P<count>\d+)$")


def bits(nats: float) -> float:
    """Convert a loss in nats to bits."""
    return nats / math.log(2)


@dataclass
class TrainingLog:
    """The numbers in the log of a run with `--log-interval 1`.

    Attributes:
        losses: iteration -> training loss in nats per token.
        milliseconds: iteration -> time that it took.
        heldout: iteration -> validation loss in nats per token.
        last: the last iteration of the run.
        batch: sequences per iteration.
        parameters: number of parameters of the model.
        seq_length: number of tokens of a sequence.
    """

    losses: dict[int, float] = field(default_factory=dict)
    milliseconds: dict[int, float] = field(default_factory=dict)
    heldout: dict[int, float] = field(default_factory=dict)
    last: int = 0
    batch: int = 0
    parameters: int = 0
    seq_length: int = 0

    def read(self, line: str) -> int | None:
        """Read one line of the log. Return the number of the iteration if the line reports one, else None."""
        if match := _ITERATION.search(line):
            return self._read_iteration(match)
        if match := _HELDOUT.search(line):
            self.heldout[int(match["iteration"])] = float(match["loss"])
        elif match := _PARAMETERS.search(line):
            self.parameters += int(match["count"])
        return None

    def _read_iteration(self, match: re.Match) -> int:
        iteration, loss, ms = int(match["iteration"]), float(match["loss"]), float(match["ms"])
        if len(self.losses) == 1:
            # Megatron does not reset its averages after the first line, so the second line has means of two iterations
            loss = 2 * loss - self.losses[iteration - 1]
            ms = 2 * ms - self.milliseconds[iteration - 1]
        self.losses[iteration], self.milliseconds[iteration] = loss, ms
        self.last, self.batch = int(match["last"]), int(match["batch"])
        return iteration

    def tokens_per_second(self, milliseconds: float | None = None) -> float:
        """Return the tokens/s of an iteration that took `milliseconds`. None means the run's median iteration.

        Slow first iterations hardly change the median.
        """
        if milliseconds is None:
            milliseconds = statistics.median(self.milliseconds.values())
        return 1000 * self.batch * self.seq_length / milliseconds


def first_difference(full: TrainingLog, resumed: TrainingLog) -> str | None:
    """Compare the losses of a resumed run with the uninterrupted run. All seven printed digits must be equal.

    Returns:
        A description of the first loss that differs, or None.
    """
    for position, (iteration, loss) in enumerate(resumed.losses.items()):
        # the second loss was computed from a rounded mean of two losses, see _read_iteration
        tolerance = 2e-6 if position == 1 else 0
        if not abs(loss - full.losses[iteration]) <= tolerance:
            return f"training loss of iteration {iteration}: {full.losses[iteration]} before, {loss} resumed"
    for iteration, loss in resumed.heldout.items():
        if loss != full.heldout[iteration]:
            return f"held-out loss at iteration {iteration}: {full.heldout[iteration]} before, {loss} resumed"
    if full.last not in resumed.losses or full.last not in resumed.heldout:
        return f"the resumed run did not reach iteration {full.last}"
    return None


def environment() -> dict[str, str]:
    """Return the environment of a run. It sets the number of CPU threads, because torchrun's default is one."""
    env = dict(os.environ, PYTHONUNBUFFERED="1")
    if not torch.cuda.is_available():
        env.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    return env


def device_flags() -> list[str]:
    """Return flags for this machine: bf16 on a GPU, and Megatron's own modules if Transformer Engine is missing."""
    if not torch.cuda.is_available():
        return []  # the launcher's CPU mode sets its own flags
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        without = "--no-persist-layer-norm --no-gradient-accumulation-fusion --no-rope-fusion"
        return ["--bf16", "--transformer-impl", "local", *without.split()]
    return ["--bf16"]


def run_lines(command: list[str], log: Path) -> Iterator[str]:
    """Run a command, yield its lines as they come, and write all of them to `log`.

    Raises:
        SystemExit: the command failed. Its last lines are printed.
    """
    with open(log, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment(),
        )
        try:
            for line in process.stdout or ():
                file.write(line)
                file.flush()
                yield line.rstrip("\n")
        except BaseException:
            # also after an interrupt, so that no training continues in the background
            process.terminate()
            raise
        finally:
            process.wait()
    if process.returncode:
        printed = log.read_text().splitlines()
        # print the lines of the ranks, because torchrun's report at the end does not name the cause
        reasons = [line for line in printed if line.startswith(("[rank", "hgrn2_megatron: error"))]
        print("\n".join((reasons or printed)[-25:]), file=sys.stderr)
        sys.exit(f"training failed with exit status {process.returncode}; its whole output is in {log}")


def train(flags: Iterable[str], log: Path, every: int = 10, script: str = "pretrain_hybrid.py") -> TrainingLog:
    """Run a script of this folder through the launcher, print its progress, and return the numbers of its log.

    Args:
        flags: flags for Megatron.
        log: file for the whole output of the run.
        every: number of iterations between two lines of progress.
        script: pretrain_hybrid.py for a HybridModel, or pretrain_gpt.py for a GPT.
    """
    flags = list(flags)
    script = str(Path(__file__).with_name(script))
    run = TrainingLog(seq_length=int(flags[flags.index("--seq-length") + 1]))
    for line in run_lines([sys.executable, *LAUNCH, script, *flags, "--log-interval", "1"], log):
        known = len(run.heldout)
        iteration = run.read(line)
        if line.startswith(("HGRN2", "hgrn2_megatron:")):
            print(line, flush=True)
        elif iteration and (iteration % every == 0 or iteration == run.last or len(run.losses) == 1):
            loss, speed = bits(run.losses[iteration]), run.tokens_per_second(run.milliseconds[iteration])
            print(
                f"iteration {iteration:4d}/{run.last}  loss {loss:.3f} bits per byte{speed:9,.0f} tokens/s",
                flush=True,
            )
        elif len(run.heldout) > known:
            at = max(run.heldout)
            print(
                f"iteration {at:4d}/{run.last}  held-out {bits(run.heldout[at]):.3f} bits per byte",
                flush=True,
            )
    return run
