"""Kernel launches that skip the search that Triton makes at every call.

A launch through Triton's front end costs the host tens of microseconds for the forty arguments of a chunk kernel. On a
small shape this is more than the kernel itself takes. A `Launch` binds all arguments except the tensors once. Its
caller keeps it, one for each shape. A kernel that copies tiles by TMA also takes
descriptors, see hopper_tiles.py.

The first call goes through Triton, which compiles the kernel. Later calls repeat the private call with which Triton
starts a compiled kernel. Where the installed Triton makes that call in another form, every launch goes through Triton:
the results are the same, and each launch costs the host more time. Triton's launch hooks run only in launches through
Triton.
"""

import ast
import functools
import inspect
import operator
import textwrap

import torch
from torch import Tensor
from triton.runtime import JITFunction

# the private call in `JITFunction.run` that `Launch` repeats
PRIVATE_CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


class Launch:
    """A jitted kernel on a grid, with every argument that is not a tensor.

    The kernel takes descriptors first, if it takes any, and then its tensors.

    Args:
        jitted: the kernel.
        grid: one to three numbers of programs.
        num_warps: number of warps of a program.
        numbers: arguments by name. Names that the kernel does not have are ignored.
    """

    def __init__(self, jitted, grid: tuple[int, ...], num_warps: int, **numbers):
        self.jitted = jitted
        self.grid = (*grid, 1, 1)[:3]
        self.num_warps = num_warps
        self.numbers = [numbers[name] for name in jitted.arg_names if name in numbers]
        self.run = None

    def __call__(self, *tensors: Tensor, descriptors=()):
        """Launch on the current device.

        Args:
            tensors: the tensors in the kernel's order. Their dtypes and device must be the same at every call.
            descriptors: descriptors for TMA, in the kernel's order. Their dtypes, tiles and layouts must be the same at
                every call. The caller keeps the memory that they describe alive until the call returns.
        """
        # Triton also takes addresses, and it checks less when it gets them
        addresses = [x.data_ptr() for x in tensors]
        if self.run is None or functools.reduce(operator.or_, addresses) % 16:
            return self._launch_by_triton(tensors, descriptors)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        # the arguments of PRIVATE_CALL, without metadata of the launch and without hooks
        self.run(*self.grid, stream, *self.compiled, None, None, None, *descriptors, *addresses, *self.numbers)

    def _launch_by_triton(self, tensors, descriptors):
        compiled = self.jitted[self.grid](*descriptors, *tensors, *self.numbers, num_warps=self.num_warps)
        # The interpreter compiles nothing. A kernel that was compiled for tensors aligned to 16 bytes serves all such.
        is_compiled = isinstance(self.jitted, JITFunction)
        if is_compiled and makes_private_call(JITFunction.run) and not any(x.data_ptr() % 16 for x in tensors):
            self.device = tensors[0].device.index
            self.compiled = compiled.function, compiled.packed_metadata
            self.run = compiled.run


@functools.cache
def makes_private_call(run) -> bool:
    """Return True if `run`, Triton's method that launches a kernel, makes the call that `Launch` repeats.

    The method's source is read once. If it cannot be read, the answer is False.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(run)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(isinstance(node, ast.Call) and ast.unparse(node) == PRIVATE_CALL for node in ast.walk(tree))
