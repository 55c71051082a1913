"""The devices that benchmarks run on: which there are, and who has them."""

import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Iterator

import torch

# without a GPU
CPU_PROCESSES = 8


class Devices:
    """The GPUs of the host, or places for processes without one, lent to runs."""

    def __init__(self, names: list[str]):
        self.free = list(names)
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def lent(self, count: int) -> Iterator[list[str]]:
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
    """Of the GPUs, as CUDA_VISIBLE_DEVICES has them; numbers of processes where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible and torch.cuda.is_available():
        return visible.split(",")
    return [str(i) for i in range(torch.cuda.device_count() or CPU_PROCESSES)]


def machine() -> str:
    """What the table was measured on, in a line."""
    gpus = torch.cuda.device_count()
    device = f"{gpus} x {torch.cuda.get_device_name()}" if gpus else f"{os.cpu_count()} CPU cores, gloo"
    versions = []
    for package in ("torch", "transformer-engine", "megatron-core"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join([device, *versions])
