"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. Here all arguments but the tensors are bound once:
a `Launch` is kept by who makes it, for each shape. Triton's launch hooks are left out.
"""

import functools
import operator

import torch
import triton
from torch import Tensor


class Launch:
    """A jitted kernel on a grid, with every argument that is not a tensor; the kernel takes its tensors first.

    Args:
        jitted: the kernel.
        grid: up to three numbers of programs.
        num_warps: of a program.
        numbers: arguments by name, of which the kernel takes those it has.
    """

    def __init__(self, jitted, grid: tuple[int, ...], num_warps: int, **numbers):
        self.jitted = jitted
        self.grid = (*grid, 1, 1)[:3]
        self.num_warps = num_warps
        self.numbers = [numbers[name] for name in jitted.arg_names if name in numbers]
        self.run = None

    def __call__(self, *tensors: Tensor):
        """Launch on the current device.

        Args:
            tensors: in the kernel's order; of the same dtypes and device at every call.
        """
        # triton takes an address as well, and asks less of it
        addresses = [x.data_ptr() for x in tensors]
        if self.run is None or functools.reduce(operator.or_, addresses) % 16:
            return self._launch_by_triton(tensors)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        # grid, stream, function, metadata of the kernel and of the launch, hooks
        self.run(*self.grid, stream, *self.compiled, None, None, None, *addresses, *self.numbers)

    def _launch_by_triton(self, tensors):
        compiled = self.jitted[self.grid](*tensors, *self.numbers, num_warps=self.num_warps)
        # what is compiled for tensors aligned to 16 bytes serves all such; in the interpreter nothing is compiled
        if isinstance(self.jitted, triton.runtime.JITFunction) and not any(x.data_ptr() % 16 for x in tensors):
            self.device = tensors[0].device.index
            self.compiled = compiled.function, compiled.packed_metadata
            self.run = compiled.run
