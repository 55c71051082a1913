"""Read rates, memory, losses and failures from the log of a Megatron run."""

import re
import statistics
from dataclasses import dataclass

from runs import OVERTIME

OUT_OF_MEMORY = "out of memory"
NOT_TRIED = "not tried: a shorter length ran out of memory or time"
# reasons not to try a longer sequence
TOO_LARGE = (NOT_TRIED, OVERTIME, OUT_OF_MEMORY)


@dataclass
class Figures:
    """The figures of one run. Times and rates are from the median iteration after the warm-up.

    Attributes:
        milliseconds: time of an iteration.
        rate: tokens/s per GPU.
        tflops: TFLOP/s per GPU.
        peak: largest allocated memory in GiB.
        losses: the loss of each iteration.
        norms: the norm of the gradient in each iteration.
        sent: MiB that rank 0 sends in the second iteration, or None if nothing was counted. Later iterations may be
            replayed from a CUDA graph, where sending cannot be counted.
    """

    milliseconds: float
    rate: float
    tflops: float
    peak: float
    losses: list[float]
    norms: list[float]
    sent: float | None

    @classmethod
    def of(cls, log: str, tokens: int, processes: int, warm_up: int) -> "Figures | None":
        """Return the figures in the log of a run, or None if the run did not finish.

        Args:
            log: output of Megatron.
            tokens: number of tokens of one iteration.
            processes: number of GPUs.
            warm_up: number of iterations at the start that do not count.
        """
        if failure(log):
            return None

        def median(name: str) -> float:
            found = numbers(name, log)
            return statistics.median(found[warm_up:] or found)

        sent = numbers("bytes sent", log)[:2]
        milliseconds = median(r"elapsed time per iteration \(ms\)")
        return cls(
            milliseconds,
            tokens / milliseconds * 1000 / processes,
            median(r"throughput per GPU \(TFLOP/s/GPU\)"),
            max(numbers("max allocated", log)) / 1024,
            numbers("lm loss", log),
            numbers("grad norm", log),
            sent[-1] / 2**20 if sent else None,
        )


def numbers(name: str, log: str) -> list[float]:
    """Return the numbers that Megatron logged under a name, which is a regular expression."""
    return [float(x) for x in re.findall(rf"{name}: (\S+)", log)]


def failure(log: str) -> str:
    """Return the reason why a run failed, or "" if it finished."""
    iterations = re.findall(r"iteration +(\d+)/ *(\d+) \|", log)
    if iterations and iterations[-1][0] == iterations[-1][1]:
        return ""
    return next((sign for sign in TOO_LARGE if sign in log), "failed: see the log")
