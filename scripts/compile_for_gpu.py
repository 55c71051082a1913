"""Compile the kernels that a program launches on a GPU, on a machine that has none.

    TRITON_CACHE_DIR=cache python scripts/compile_for_gpu.py [--arch 90] [-m] PROGRAM [ARGUMENT ...]

The program (with -m a module, such as pytest) runs with tensors that have shapes but no numbers, with a driver that
answers for the GPU, and with launches that only compile. A number that the program reads from a tensor is 0, and a
condition on a tensor is true. So its output, and the results of its tests, mean nothing. Copy the cache to a machine
that has the GPU and the same triton, into a folder with the same path, because triton writes whole paths into it. There
the program starts without compiling. Autotuned kernels are in the cache in every configuration, and are still timed.
"""

import argparse
import os
import runpy
import sys
import types
from unittest.mock import patch

# before triton is imported
os.environ.pop("TRITON_INTERPRET", None)

import torch
import torch.fx.experimental._config
import triton
import triton.testing
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

# bytes of shared memory that one block may take (CUDA programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}


class Driver:
    """The answers that triton needs from a GPU driver when it compiles and tunes."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)
        properties = dict(max_shared_mem=SHARED[arch], max_num_regs=65536, multiprocessor_count=132, warpSize=32)
        self.utils = types.SimpleNamespace(get_device_properties=lambda device: properties)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        def benchmark(call, quantiles):
            call()
            return [1.0] * len(quantiles)

        return benchmark


ANSWERS = {
    torch.Tensor.item: 0,
    torch.Tensor.__bool__: True,
    torch.Tensor.__float__: 0.0,
    torch.equal: True,
}


class Shapes(TorchFunctionMode):
    """A mode in which tensors for a GPU are made on the meta device, without numbers."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        args = [_meta(x) for x in args]
        if "device" in kwargs:
            kwargs["device"] = _meta(kwargs["device"])
        if function in ANSWERS:
            return ANSWERS[function]
        if function is torch.Tensor.cuda:
            return args[0].to("meta")
        return function(*args, **kwargs)


def _meta(x):
    is_name = isinstance(x, torch.device) or isinstance(x, str) and x.split(":")[0] == "cuda"
    return torch.device("meta") if is_name and torch.device(x).type == "cuda" else x


class Nothing:
    """A stand-in for a compiled kernel and for other objects of a GPU. Every method does nothing."""

    function = packed_metadata = None

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        return lambda *args: None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False


def _call_once(call, **options):
    call()
    return 1.0


def pretend(arch: int):
    """Make torch and triton behave as if there were a GPU of this compute capability (90 for 9.0)."""
    triton.runtime.driver.set_active(Driver(arch))
    original = JITFunction.run

    def run(self, *args, grid=None, warmup=False, **options):
        original(self, *args, grid=grid, warmup=True, **options)
        return Nothing()

    JITFunction.run = run
    name = "NVIDIA H100" if arch == 90 else f"compute capability {arch / 10}"
    properties = types.SimpleNamespace(
        name=name,
        multi_processor_count=132,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=SHARED[arch],
    )
    answers = dict(
        is_available=True, current_device=0, device_count=1, get_device_name=name, synchronize=None,
        get_device_capability=divmod(arch, 10), get_device_properties=properties, current_stream=Nothing(),
        memory_allocated=0, max_memory_allocated=0, reset_peak_memory_stats=None, set_sync_debug_mode=None,
    )  # fmt: skip
    for question, answer in answers.items():
        setattr(torch.cuda, question, lambda *args, answer=answer: answer)
    for name in ("device", "device_of", "stream", "Stream", "Event", "graph", "CUDAGraph"):
        setattr(torch.cuda, name, Nothing)
    triton.testing.do_bench = _call_once

    def tune(self, tuning_key, configs, bench_fn):
        # a choice that was not timed must not be written to the cache
        bench_fn()
        return False

    Autotuner.check_disk_cache = tune
    autocast = torch.autocast
    torch.autocast = lambda device, **options: autocast("cpu", **options)
    # for indexing with a mask
    torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    torch.Tensor.is_cuda = property(lambda x: x.device.type == "meta")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED), help="compute capability times 10")
    parser.add_argument("-m", action="store_true", dest="module", help="PROGRAM is a module")
    parser.add_argument("program")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    pretend(args.arch)
    from hgrn2_kernels import op

    def implementation(device, dtype):
        return "triton" if torch.device(device).type == "meta" and dtype != torch.float64 else "pytorch"

    sys.argv = [args.program, *args.arguments]
    with (
        Shapes(),
        patch.object(op, "implementation", implementation),
    ):
        if args.module:
            runpy.run_module(args.program, run_name="__main__", alter_sys=True)
        else:
            # the first place where Python looks when it runs a program
            sys.path.insert(0, os.path.dirname(os.path.abspath(args.program)))
            runpy.run_path(args.program, run_name="__main__")


if __name__ == "__main__":
    main()
