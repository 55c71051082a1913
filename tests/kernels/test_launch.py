"""A launch repeats Triton's private call, and goes through Triton where that call has another form.

No GPU is needed. Triton's own front end compiles and launches, and a stand-in for the driver records each launch.
"""

import json
import types

import harness
import pytest
import torch
import triton
from operator_cases import TRITON_RELEASE
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.runtime import JITFunction

from hgrn2_kernels.hopper_tiles import Descriptors, descriptor
from hgrn2_kernels.launch import Launch, makes_private_call

# prints what the launcher of a compiled kernel was given, tensors by their addresses, and whether it got tensors
PROGRAM = """
import json, types
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from hgrn2_kernels import launch
from hgrn2_kernels.hopper_tiles import descriptor

launches = []

class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *arguments):
        # metadata of the launch and two hooks, which a Launch leaves out
        arguments = arguments[:6] + arguments[9:]
        by_triton = any(isinstance(x, torch.Tensor) for x in arguments)
        arguments = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        arguments = [[x.base.data_ptr(), x.shape, x.strides] if hasattr(x, "base") else x for x in arguments]
        launches.append([by_triton, arguments])

properties = {"max_shared_mem": 2**17, "max_num_regs": 2**16, "multiprocessor_count": 132, "warpSize": 32}
driver = types.SimpleNamespace(
    launcher_cls=Launcher,
    get_current_target=lambda: GPUTarget("cuda", 90, 32),
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 77,
    utils=types.SimpleNamespace(
        get_device_properties=lambda device: properties,
        load_binary=lambda *binary: (1, 2, 3, 0, 1024),
    ),
)
triton.runtime.driver.set_active(driver)
torch._C._cuda_getCurrentRawStream = lambda device: 77

@triton.jit
def kernel(x, y, scale, length, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(y + at, tl.load(x + at, mask=at < length) * scale, mask=at < length)

@gluon.jit
def copy(tiles, x, number, SIZE: gl.constexpr):
    pass

x, y = torch.zeros(2, 64).unbind()
wide = torch.zeros(1, 64, 2, 128, dtype=torch.bfloat16)
for call in (launch.PRIVATE_CALL, "kernel.run(another, signature)"):
    launch.PRIVATE_CALL = call
    launch.makes_private_call.cache_clear()
    scaled = launch.Launch(kernel, (5,), 4, length=48, SIZE=64, scale=0.5, unknown=1)
    for tensors in ((x, y), (y, x), (x[1:], y), (x, y)):
        scaled(*tensors)
    tiled = launch.Launch(copy, (3,), 4, number=5, SIZE=6)
    for T in (64, 64, 32):
        tiled(x, descriptors=[descriptor(wide[:, :T], 64, False)])
print(json.dumps(launches))
"""


def test_launches_with_and_without_the_private_call(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = harness.python(str(tmp_path / "program.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    by_triton, arguments = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    # Triton launches the first time, which compiles, and for tensors that are not aligned
    assert by_triton[:7] == (True, False, True, False, True, False, False)
    # where Triton's call is another one, it makes every launch
    assert by_triton[7:] == (True,) * 7
    # both ways pass the same grid, stream, kernel, addresses and numbers
    assert arguments[:7] == arguments[7:]
    first, swapped, unaligned, again, tiles, same_tiles, shorter = arguments[:7]
    assert first == again and first[:4] == [5, 1, 1, 77] and first[-3:] == [0.5, 48, 64]
    assert swapped == [*first[:6], first[7], first[6], *first[8:]]
    assert unaligned[6] == first[6] + 4
    # descriptors come before the tensors, and keep their address, shape and strides
    assert tiles == same_tiles and tiles[6][1:] == [[1, 64, 2, 128], [128, 256, 128, 1]] and tiles[-2:] == [5, 6]
    assert shorter[6] == [tiles[6][0], [1, 32, 2, 128], tiles[6][2]] and shorter[7:] == tiles[7:]


def test_the_installed_triton_makes_the_call_that_is_repeated():
    assert makes_private_call(JITFunction.run)


def run_of_another_triton(self, *args, grid, warmup, kernel, launch_metadata, **kwargs):
    kernel.run(grid, kernel.function, kernel.packed_metadata, launch_metadata, *args)


@pytest.mark.parametrize("run", [run_of_another_triton, len], ids=["another call", "no source"])
def test_a_launch_that_is_not_known_is_found(run):
    assert not makes_private_call(run)


class AnotherLauncher(CudaLauncher):
    def __call__(self, *arguments):
        super().__call__(*arguments)


KNOWN = TRITON_RELEASE in ((3, 6), (3, 8), (3, 9))


@pytest.mark.parametrize(
    ("launcher", "size", "times"),
    [(CudaLauncher, 0, 1 if KNOWN else 2), (AnotherLauncher, 0, 2), (CudaLauncher, 8, 2)],
    ids=["known", "another launcher", "a kernel with memory of its own"],
)
def test_descriptors_keep_the_drivers_form(launcher, size, times, monkeypatch):
    """A Launch passes to Triton's C function what Triton would pass, and makes the form of a descriptor once.

    Where it does not know the launcher, or where the kernel needs memory of its own, Triton makes the form every time.
    """
    calls, made = [], []

    def fill(*tile):
        made.append(tile)
        return tile

    def launch(*arguments):
        *arguments, last = arguments
        # Triton 3.8 and 3.9 put the arguments of the kernel into one sequence
        calls.append([*arguments, *last] if isinstance(last, list | tuple) else [*arguments, last])

    # Triton 3.6 and later releases have two names for the same function
    utils = types.SimpleNamespace(fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill)
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(utils=utils))
    monkeypatch.setattr(triton.runtime._allocation, "_allocator", types.SimpleNamespace(get=lambda: lambda *size: size))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 77, raising=False)
    metadata = [dict(swizzle=3, elem_size=2, elem_type=10, block_size=[1, 64, 1, 128], fp4_padded=False)]
    launcher = object.__new__(launcher)
    vars(launcher).update(global_scratch_size=size, global_scratch_align=1, profile_scratch_size=0, num_ctas=1)
    vars(launcher).update(profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=True)
    # Triton 3.6 does not read these three
    vars(launcher).update(gsan_enabled=False, arg_annotations="annotations", kernel_signature=b"signature")
    signature = {0: "tensordesc<bf16[1, 64, 1, 128]>", 1: "*fp32", 2: "i32"}
    launcher.launch = wrap_handle_tensordesc(launch, signature, metadata)
    scaled = Launch(types.SimpleNamespace(arg_names=["tiles", "x", "n"]), (3,), 4, n=5)
    scaled.device = 0
    scaled._keep(types.SimpleNamespace(run=launcher, function=7, packed_metadata="packed"))
    x, tiles = torch.zeros(64), descriptor(torch.zeros(1, 192, 2, 128, dtype=torch.bfloat16), 64, False)
    # the second time, the descriptor comes with other company
    for descriptors in (Descriptors([tiles]), Descriptors([tiles])):
        scaled(x, descriptors=descriptors)
    assert len(made) == times
    launcher(3, 1, 1, 77, 7, "packed", None, None, None, tiles, x.data_ptr(), 5)
    assert calls[0] == calls[1] == calls[2] and made[0] == made[-1]


def test_a_descriptor_that_could_not_be_made_is_made_again():
    made = []

    def make(descriptor, metadata):
        made.append(descriptor)
        if len(made) == 2:
            raise RuntimeError("the driver failed once")
        return [descriptor]

    launch = object.__new__(Launch)
    vars(launch).update(key="both", keys=["first", "second"], metadata=[{}, {}], make=make)
    first, second = types.SimpleNamespace(), types.SimpleNamespace()
    descriptors = Descriptors([first, second])
    with pytest.raises(RuntimeError, match="failed once"):
        launch._made(descriptors)
    assert launch._made(descriptors) == [first, second]
    assert made == [first, second, second]
