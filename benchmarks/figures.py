"""What Megatron's log of a run says of it."""

import re
import statistics
from dataclasses import dataclass

from runs import OVERTIME

OUT_OF_MEMORY = "out of memory"
NOT_TRIED = "not tried: a shorter length ran out of memory or time"
# why a run ended that was too large
TOO_LARGE = (NOT_TRIED, OVERTIME, OUT_OF_MEMORY)


@dataclass
class Figures:
    """What a run's log says; rates are of the median iteration after the first ones.

    Attributes:
        milliseconds: of an iteration.
        rate: tokens/s a GPU.
        tflops: TFLOP/s a GPU.
        peak: GiB.
        losses, norms: of each iteration; norms of the gradient.
        sent: MiB that rank 0 sends in the second iteration, which no CUDA graph hides yet; None if not counted.
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
        """Of an iteration of so many tokens; None of a run that did not reach its end."""
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
    """What Megatron logged under a name, a regular expression."""
    return [float(x) for x in re.findall(rf"{name}: (\S+)", log)]


def failure(log: str) -> str:
    """What went wrong, nothing in a run that reached its end."""
    iterations = re.findall(r"iteration +(\d+)/ *(\d+) \|", log)
    if iterations and iterations[-1][0] == iterations[-1][1]:
        return ""
    return next((sign for sign in TOO_LARGE if sign in log), "failed: see the log")
