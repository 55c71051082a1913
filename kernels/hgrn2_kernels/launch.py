"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. Here all arguments but the tensors are bound once:
a `Launch` is kept by who makes it, for each shape. Triton's launch hooks are left out.
"""

import torch
import triton
from torch import Tensor

# place of the stream among the arguments of a compiled kernel
STREAM = 3


class Launch:
    """A jitted kernel on a grid, with every argument that is not a tensor.

    Args:
        jitted: the kernel.
        grid: up to three numbers of programs.
        num_warps: of a program.
        numbers: arguments by name, of which the kernel takes those it has.
    """

    def __init__(self, jitted, grid: tuple[int, ...], num_warps: int, **numbers):
        self.jitted = jitted
        self.grid = grid
        self.num_warps = num_warps
        self.numbers = numbers
        self.bound = None

    def __call__(self, tensors: dict[str, Tensor]):
        """Launch on the current device.

        Args:
            tensors: by name, of which the kernel takes those it has; of the same dtypes and device at every call.
        """
        if self.bound is None or not self.bound.launch(tensors):
            self._launch_by_triton({**self.numbers, **tensors})

    def _launch_by_triton(self, arguments):
        names = self.jitted.arg_names
        ordered = [arguments[name] for name in names]
        compiled = self.jitted[self.grid](*ordered, num_warps=self.num_warps)
        # in the interpreter nothing is compiled
        if isinstance(self.jitted, triton.runtime.JITFunction):
            if not any(x.data_ptr() % 16 for x in ordered if isinstance(x, Tensor)):
                self.bound = _Bound(compiled, self.grid, names, ordered)


class _Bound:
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
