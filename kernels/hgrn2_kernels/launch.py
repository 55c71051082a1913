"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. What the compiled form depends on is little: the
constants, the types, and which numbers are 1 or multiples of 16. It is looked up by that.
"""

import torch
import triton
from torch import Tensor

# tl.constexpr: a kernel is compiled for each value
CONSTANT = frozenset(
    "H K V C LEVELS BK BF BV DT REVERSE STATES LAST DECAYS EXACT SCAN BOUNDED HAS_FIRST PACKED TABLED FULL"
    " STAGES".split()
)
# numbers that change from call to call, on which no kernel is specialised
LOOSE = frozenset(("T", "NT", "NC", "SEGMENTS", "LENGTH"))


class Arguments(dict):
    """Arguments by name that several launches share, and what of them decides a compiled form."""

    def __init__(self, **arguments):
        super().__init__(arguments)
        self.kinds = _kinds(arguments)


class Kernel:
    """A jitted kernel and its compiled forms."""

    def __init__(self, jitted):
        self.jitted = jitted
        self.compiled = {}
        self.names = jitted.arg_names
        # in the interpreter nothing is compiled
        self.interpreted = not isinstance(jitted, triton.runtime.JITFunction)
        if not self.interpreted:
            for p in jitted.params:
                if p.is_constexpr != (p.name in CONSTANT) or p.do_not_specialize != (p.name in LOOSE):
                    raise ValueError(f"{jitted.__name__}: add {p.name} to CONSTANT or LOOSE, or take it out")

    def launch(self, grid: tuple[int, ...], num_warps: int, shared: Arguments, **own):
        """Launch with arguments by name, of which the kernel takes those it has; its device must be the current one."""
        arguments = shared | own
        ordered = [arguments[name] for name in self.names]
        if self.interpreted:
            self.jitted[grid](*ordered, num_warps=num_warps)
            return
        key = (torch.cuda.current_device(), num_warps, shared.kinds, _kinds(own))
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.jitted[grid](*ordered, num_warps=num_warps)
        else:
            compiled[(*grid, 1, 1)[:3]](*ordered)


def _kinds(arguments):
    """What of each argument decides the compiled form, and no less."""
    return tuple([_kind(name, value) for name, value in arguments.items()])


def _kind(name, value):
    if type(value) is int and name not in CONSTANT:
        return value >= 2**31 if name in LOOSE else (value >= 2**31, value == 1, value % 16 == 0)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return type(value) if type(value) is float else value
