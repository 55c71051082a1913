"""The devices of a host, and a pool that lends them to runs side by side."""

import contextlib
import os
import threading
from collections.abc import Iterator

import torch

# number of processes that may run at a time on a machine without a GPU
CPU_PROCESSES = 8


class Devices:
    """A pool of the GPUs of the host, or of numbered processes on a machine without a GPU."""

    def __init__(self, names: list[str]):
        self.free = list(names)
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def lent(self, count: int) -> Iterator[list[str]]:
        """Wait until `count` devices are free, and hold them inside the `with` block."""
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= count)
            taken, self.free = self.free[:count], self.free[count:]
        try:
            yield taken
        finally:
            with self.changed:
                self.free = sorted([*self.free, *taken])
                self.changed.notify_all()


def device_names() -> list[str]:
    """Return the GPUs by their names in CUDA_VISIBLE_DEVICES, or numbers of processes where there is no GPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and torch.cuda.is_available():
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count() or CPU_PROCESSES)]
