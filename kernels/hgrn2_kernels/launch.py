"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. Here every argument but the tensors is looked up
at once: `Numbers` says what many launches share, and the rest is part of the key. Triton's launch hooks are left out.
"""

import itertools

import torch
import triton
from torch import Tensor

# forms kept a kernel: a program whose shapes change all the time starts over
KEPT = 4096
# place of the stream among the arguments of a compiled kernel
STREAM = 3


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
        if self.interpreted or any(x.data_ptr() % 16 for x in ordered if isinstance(x, Tensor)):
            return
        if len(self.launchers) >= KEPT:
            self.launchers.clear()
        self.launchers[key] = _Launcher(compiled, grid, self.names, ordered)


class _Launcher:
    """A compiled kernel on a grid with its numbers, for tensors that are aligned to 16 bytes as the first were."""

    def __init__(self, compiled, grid, names, ordered):
        self.run = compiled.run
        # grid, stream, function, metadata of the kernel and of the launch, hooks
        head = [*(*grid, 1, 1)[:3], None, compiled.function, compiled.packed_metadata, None, None, None]
        self.template = [*head, *(None if isinstance(x, Tensor) else x for x in ordered)]
        self.tensors = [(len(head) + n, names[n]) for n, x in enumerate(ordered) if isinstance(x, Tensor)]
        self.device = next(x.device.index for x in ordered if isinstance(x, Tensor))

    def launch(self, tensors) -> bool:
        arguments = self.template.copy()
        bits = 0
        for n, name in self.tensors:
            # triton takes an address as well, and asks less of it
            arguments[n] = address = tensors[name].data_ptr()
            bits |= address
        if bits % 16:
            return False
        arguments[STREAM] = torch._C._cuda_getCurrentRawStream(self.device)
        self.run(*arguments)
        return True
