"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host about 65 microseconds with the forty arguments of a chunk
kernel, more than the kernel itself takes on a small shape. What the compiled form depends on is little: the constants,
the types, and which numbers are 1 or multiples of 16. It is looked up by that.
"""

import torch
import triton
from torch import Tensor


class Kernel:
    """A jitted kernel and its compiled forms."""

    def __init__(self, jitted):
        self.jitted = jitted
        self.compiled = {}
        self.names = jitted.arg_names
        # in the interpreter nothing is compiled
        self.interpreted = not isinstance(jitted, triton.runtime.JITFunction)
        if not self.interpreted:
            self.loose = {p.name for p in jitted.params if p.do_not_specialize}
            self.constant = {p.name for p in jitted.params if p.is_constexpr}

    def launch(self, grid: tuple[int, ...], num_warps: int, **arguments):
        """Launch with every argument by name; the device must be the current one."""
        if self.interpreted:
            self.jitted[grid](**arguments, num_warps=num_warps)
            return
        ordered = [arguments[name] for name in self.names]
        key = (torch.cuda.current_device(), num_warps, *map(self._kind, self.names, ordered))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.jitted[grid](**arguments, num_warps=num_warps)
        else:
            compiled[(*grid, 1, 1)[:3]](*ordered)

    def _kind(self, name, value):
        """What of an argument decides the compiled form, and no less."""
        if name in self.constant:
            return value
        if isinstance(value, Tensor):
            return value.dtype, value.data_ptr() % 16 == 0
        if isinstance(value, int):
            large = not -(2**31) <= value < 2**31
            return large if name in self.loose else (large, value == 1, value % 16 == 0)
        return type(value)
