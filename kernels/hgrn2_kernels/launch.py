"""Launching a Triton kernel without the search that triton makes at every call.

A launch through triton's own front end costs the host tens of microseconds with the forty arguments of a chunk
kernel, which is more than the kernel itself takes on a small shape. What the compiled form depends on is little: the
constants, the types, and which numbers are 1 or multiples of 16. It is looked up by that.
"""

import torch
import triton
from torch import Tensor

# numbers that change from call to call, on which no kernel is specialised
LOOSE = frozenset(("T", "NT", "NC", "SEGMENTS", "LENGTH"))


class Arguments(dict):
    """Arguments by name that several launches share, and what of them decides a compiled form."""

    def __init__(self, **arguments):
        super().__init__(arguments)
        self.kinds = _kinds(arguments)


class Kernel:
    """A jitted kernel and its compiled forms. Its constants, and they alone, have names in capitals, but for LOOSE."""

    def __init__(self, jitted):
        self.jitted = jitted
        self.compiled = {}
        self.names = jitted.arg_names
        # in the interpreter nothing is compiled
        self.interpreted = not isinstance(jitted, triton.runtime.JITFunction)
        if not self.interpreted:
            for p in jitted.params:
                if p.is_constexpr != (p.name.isupper() and p.name not in LOOSE):
                    raise ValueError(f"{jitted.__name__}: {p.name} must be in capitals if it is a constant, else not")
                if p.do_not_specialize != (p.name in LOOSE):
                    raise ValueError(f"{jitted.__name__}: {p.name} must be in do_not_specialize if it is in LOOSE")

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
    kinds = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif name in LOOSE:
            kinds.append(value >= 2**31)
        elif name.isupper():
            kinds.append(value)
        elif isinstance(value, int):
            kinds.append((value >= 2**31, value == 1, value % 16 == 0))
        else:
            kinds.append(type(value))
    return tuple(kinds)
