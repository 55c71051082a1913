"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. Here every argument but the tensors is looked up
at once: `Numbers` says what many launches share, and the rest is part of the key.
"""

import itertools

import triton
from torch import Tensor

# forms kept a kernel: a program whose shapes change all the time starts over
KEPT = 4096


class Numbers(dict):
    """Arguments that are not tensors, by name, never changed; equal only to itself."""

    _count = itertools.count()

    def __init__(self, **numbers):
        super().__init__(numbers)
        self.token = next(self._count)


class Kernel:
    """A jitted kernel and how it has been launched."""

    def __init__(self, jitted):
        self.jitted = jitted
        self.names = jitted.arg_names
        # in the interpreter nothing is compiled
        self.interpreted = not isinstance(jitted, triton.runtime.JITFunction)
        self.launchers = {}

    def launch(
        self, grid: tuple[int, ...], num_warps: int, shared: Numbers, own: dict[str, int], tensors: dict[str, Tensor]
    ):
        """Launch on the current device with arguments by name, of which the kernel takes those it has.

        Args:
            own: numbers beyond the shared, under the same names in the same order at every call.
            tensors: all on the current device, of the same dtypes whenever the numbers are the same.
        """
        key = (shared.token, grid, num_warps, *own.values())
        launcher = self.launchers.get(key)
        if launcher is None or not launcher.launch(tensors):
            self._launch_by_triton(key, grid, num_warps, {**shared, **own, **tensors})

    def _launch_by_triton(self, key, grid, num_warps, arguments):
        ordered = [arguments[name] for name in self.names]
        compiled = self.jitted[grid](*ordered, num_warps=num_warps)
        if not self.interpreted and _aligned(x for x in ordered if isinstance(x, Tensor)):
            if len(self.launchers) >= KEPT:
                self.launchers.clear()
            self.launchers[key] = _Launcher(compiled[(*grid, 1, 1)[:3]], self.names, ordered)


class _Launcher:
    """A compiled kernel on a grid with its numbers, for tensors that are aligned to 16 bytes as the first were."""

    def __init__(self, run, names, ordered):
        self.run = run
        self.template = [None if isinstance(x, Tensor) else x for x in ordered]
        self.tensors = [(n, name) for n, (name, x) in enumerate(zip(names, ordered, strict=True)) if isinstance(x, Tensor)]

    def launch(self, tensors) -> bool:
        arguments = self.template.copy()
        for n, name in self.tensors:
            arguments[n] = tensors[name]
        if not _aligned(tensors.values()):
            return False
        self.run(*arguments)
        return True


def _aligned(tensors):
    return not any([x.data_ptr() % 16 for x in tensors])
