"""Kernel launches that skip the search that Triton makes at every call.

A launch through Triton's front end costs the host tens of microseconds for the forty arguments of a chunk kernel. On a
small shape this is more than the kernel itself takes. A `Launch` binds all arguments except the tensors once. Its
caller keeps it, one for each shape. A kernel that copies tiles by TMA also takes
descriptors, see hopper_tiles.py.

The first call goes through Triton, which compiles the kernel. Later calls repeat the private call with which Triton
starts a compiled kernel. Where the installed Triton makes that call in another form, every launch goes through Triton:
the results are the same, and each launch costs the host more time. Triton's launch hooks run only in launches through
Triton.

The object that starts a compiled kernel makes the driver's form of each descriptor at every call. Where the source of
that object is the one that is known, a `Launch` calls the C function behind it, with forms that the descriptors keep.
"""

import ast
import functools
import hashlib
import inspect
import math
import textwrap

import torch
from torch import Tensor
from triton.runtime import JITFunction

# the private call in `JITFunction.run` that `Launch` repeats
PRIVATE_CALL = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)
# hashes of the source with which these releases of Triton start a compiled kernel, see source_hash
LAUNCHER_3_6 = "4d6f2fe45eb73e40a951bda912b0cb01fdb5f3234ea0db61aa7f0fa24e0adf30"
LAUNCHER_3_8 = "fb59527d0cc4d54afb7c4703e8fa879c6c17e5ccc198a0410e3afc6e7506d696"
LAUNCHER_3_9 = "d86f4c71a297973505bcd7503894b843750b93a6f08c618b03cd01cb41e1f3c2"


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
            descriptors: `hopper_tiles.Descriptors`, in the kernel's order. Their dtypes, tiles and layouts must be the
                same at every call. The caller keeps the memory that they describe alive until the call returns.
        """
        # Triton also takes addresses, and it checks less when it gets them
        addresses = [*map(Tensor.data_ptr, tensors)]
        if self.run is None or math.gcd(16, *addresses) != 16:
            return self._launch_by_triton(tensors, descriptors)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        if self.metadata:
            descriptors = self._made(descriptors)
        if self.in_one_tuple:
            self.run(*self.grid, stream, *self.compiled, (*descriptors, *addresses, *self.numbers))
        else:
            self.run(*self.grid, stream, *self.compiled, *descriptors, *addresses, *self.numbers)

    def _launch_by_triton(self, tensors, descriptors):
        compiled = self.jitted[self.grid](*descriptors, *tensors, *self.numbers, num_warps=self.num_warps)
        # The interpreter compiles nothing. A kernel that was compiled for tensors aligned to 16 bytes serves all such.
        is_compiled = isinstance(self.jitted, JITFunction)
        if is_compiled and makes_private_call(JITFunction.run) and not any(x.data_ptr() % 16 for x in tensors):
            self.device = tensors[0].device.index
            self._keep(compiled)

    def _keep(self, compiled):
        """Keep what later calls start: the launcher of a compiled kernel, or the C function that it calls."""
        launcher = run = compiled.run
        function, packed, nothing = compiled.function, compiled.packed_metadata, (None, None, None)
        # the arguments of PRIVATE_CALL, without metadata of the launch and without hooks
        arguments, metadata, in_one_tuple = (function, packed, *nothing), (), False
        known = source_hash(type(launcher))
        if known in (LAUNCHER_3_6, LAUNCHER_3_8, LAUNCHER_3_9) and not needs_more(launcher):
            flags, run = (launcher.launch_cooperative_grid, launcher.launch_pdl), launcher.launch
            if known == LAUNCHER_3_6:
                arguments = function, *flags, None, None, packed, *nothing
            else:
                types = launcher.arg_annotations, launcher.kernel_signature
                arguments, in_one_tuple = (function, *flags, packed, *nothing, None, None, *types), True
            if inspect.isfunction(run):
                # a function in Python stands before the C function, and makes the driver's form of descriptors
                outer = inspect.getclosurevars(run)
                run, metadata = (outer.nonlocals[name] for name in ("launcher", "tensordesc_meta"))
                make = inspect.getmodule(type(launcher)).make_tensordesc_arg
                self.make = make if known == LAUNCHER_3_6 else functools.partial(make, _=None)
                self.keys = [str(sorted(x.items())) for x in metadata]
                self.key = str(self.keys)
        self.compiled, self.metadata, self.in_one_tuple = arguments, metadata, in_one_tuple
        # last, because another thread launches as soon as it finds it
        self.run = run

    def _made(self, descriptors) -> list:
        """Return the driver's form of the descriptors. They keep it, all together and each one alone."""
        if self.key not in descriptors.made:
            forms = []
            for descriptor, metadata, key in zip(descriptors, self.metadata, self.keys, strict=True):
                made = descriptor.__dict__.setdefault("made", {})
                if key not in made:
                    made[key] = self.make(descriptor, metadata)
                forms += made[key]
            descriptors.made[self.key] = forms
        return descriptors.made[self.key]


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


@functools.cache
def source_hash(launcher: type) -> str:
    """Return the hash of what Triton's class `launcher` does at a launch, or an empty string if it cannot be read."""
    module = inspect.getmodule(launcher)
    try:
        parts = [launcher.__call__, module.wrap_handle_tensordesc, module.make_tensordesc_arg]
        # Triton 3.8 and 3.9 keep a part in another module
        parts += filter(None, [getattr(module, "wrap_handle_tensordesc_impl", None)])
        return hashlib.sha256("".join(map(inspect.getsource, parts)).encode()).hexdigest()
    except (AttributeError, OSError, TypeError):
        return ""


def needs_more(launcher) -> bool:
    """Return True if a kernel needs memory of its own or runs under a sanitizer. A `Launch` provides neither."""
    sanitized = getattr(launcher, "gsan_enabled", False)
    return bool(launcher.global_scratch_size or launcher.profile_scratch_size or sanitized)
