"""The CPU mode, which runs Megatron's training loop over gloo on a machine without a GPU.

On a machine with CUDA, `install` does nothing.

Megatron writes its device as the literal "cuda", so the device is replaced in torch. A TorchFunctionMode changes this
name to "cpu" in every call that makes or moves a tensor. The functions of torch.cuda that the loop calls answer for the
CPU. `torch.cuda.is_available()` stays False, because torch's own code would otherwise look for a driver.
"""

import contextlib
import logging
import os
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hgrn2_megatron.patching import wrap

# defaults of Megatron's parser in a CPU run: attribute -> value
DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "gradient_reduce_div_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}


def needed() -> bool:
    """Return whether this machine has no CUDA device, and so needs the CPU mode."""
    return not torch.cuda.is_available()


def installed() -> bool:
    """Return whether the CPU mode is on in this process."""
    return getattr(install, "done", False)


def install() -> None:
    """Turn the CPU mode on. This does nothing on a machine with CUDA, or if the mode is on.

    Call it before anything imports Megatron, which decides at its import what to compile.

    Raises:
        RuntimeError: the installed Megatron or PyTorch is an unknown release.
    """
    if not needed() or installed():
        return
    install.done = True
    # On a CPU torch.compile would compile C++ code for half a minute. Megatron requires CUDA_DEVICE_MAX_CONNECTIONS=1
    # under tensor parallelism.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "--use-megatron-fsdp" not in sys.argv:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # torch._dynamo indexes torch functions by identity when Megatron first imports it, so the patches come after this.
    import megatron.core.dist_checkpointing.strategies.filesystem_async
    import megatron.core.inference.communication_utils
    import megatron.core.optimizer.distrib_optimizer
    import megatron.core.tensor_parallel.random
    import megatron.training.initialize
    import megatron.training.training

    _fake_torch_cuda()
    _CudaMeansCpu().__enter__()
    _keep_mode_in_backward()
    _keep_mode_in_threads()
    _wait_for_coalesced()
    _adapt_megatron_random(megatron.core.tensor_parallel.random)
    _adapt_megatron_training(megatron.training.initialize)
    _adapt_distributed_optimizer(megatron.core.optimizer.distrib_optimizer.DistributedOptimizer)
    # Megatron asserts this before it sends tensors.
    _answer(megatron.core.inference.communication_utils, "_is_cuda", ["tensor"], lambda tensor: None)
    _adapt_megatron_saving(megatron.training.initialize, megatron.core.dist_checkpointing.strategies.filesystem_async)
    _keep_rng_over_dataloader_start()
    if os.environ.get("RANK", "0") == "0":
        print("hgrn2_megatron: no CUDA device, running on the CPU over gloo", file=sys.stderr, flush=True)


def _names_cuda(device) -> bool:
    # torch.cuda.current_device() returns 0 in the CPU mode, so a plain int also names a CUDA device.
    return device is not None and (type(device) is int or str(device).startswith("cuda"))


class _CudaMeansCpu(TorchFunctionMode):
    """Torch function mode that replaces CUDA devices by the CPU in every torch call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if func is torch.distributed.all_to_all_single:
            # Megatron's alltoall dispatcher of experts turns these sizes into an array only if they are on a GPU.
            for name in {"input_split_sizes", "output_split_sizes"} & kwargs.keys():
                if isinstance(kwargs[name], torch.Tensor):
                    kwargs[name] = kwargs[name].tolist()
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # Megatron's optimizers group parameters by the names of CUDA tensor types.
            result = result.replace("torch.", "torch.cuda.", 1)
        return result


def _under_mode(original: Callable) -> Callable:
    def under_mode(*args, **kwargs):
        with _CudaMeansCpu():
            return original(*args, **kwargs)

    return under_mode


def _keep_mode_in_backward() -> None:
    """Turn the mode on in the backward. A mode is off while it handles a call, such as torch.autograd.backward."""
    wrap(torch.autograd, "_engine_run_backward", ["t_outputs", "args", "kwargs"], _under_mode)


def _keep_mode_in_threads() -> None:
    """Turn the mode on in new threads, which start without it. Megatron's text generation server starts threads."""
    wrap(threading.Thread, "run", ["self"], _under_mode)


def _wait_for_coalesced() -> None:
    """Let Megatron's coalesced exchanges finish before anything else starts.

    Two coalesced all-gathers that run over gloo at the same time corrupt the memory of the process. PyTorch 2.11 does
    this without Megatron, too. Megatron starts them in --overlap-param-gather.
    """

    def make(manager):
        @contextlib.contextmanager
        def waiting(*args, **kwargs):
            with manager(*args, **kwargs) as exchange:
                yield exchange
            exchange.wait()

        return waiting

    wrap(torch.distributed.distributed_c10d, "_coalescing_manager", ["group", "device", "async_ops"], make)


class _Stream(torch.cpu.Stream):
    def __init__(self, *args, **kwargs): ...

    def synchronize(self): ...

    def record_event(self, event=None):
        return event or _Event()


class _Event(torch.cpu.Event):
    def __init__(self, *args, **kwargs): ...

    def elapsed_time(self, end):
        return 0.0


class _Generator(torch.Generator):
    """Random number generator that ignores the device, because Megatron's text generation passes a CUDA device."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def _answer(owner: Any, name: str, parameters: list[str], answer: Callable) -> None:
    """Check the parameters of `owner.name`, and replace it by `answer`, which does not call the original."""
    wrap(owner, name, parameters, lambda original: lambda *args, **kwargs: answer(*args, **kwargs))


def _fake_torch_cuda() -> None:
    # Unchecked: torch.Generator and record_stream are C code without signatures, so there is nothing to compare. Both
    # take the one argument that Megatron passes, and ignore it.
    torch.Generator = _Generator
    torch.Tensor.record_stream = lambda self, stream: None
    wrap(torch.cuda, "Stream", ["device", "priority"], lambda original: _Stream)
    wrap(torch.cuda, "Event", ["enable_timing", "blocking", "interprocess"], lambda original: _Event)
    stream = _Stream()
    properties = types.SimpleNamespace(name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1)
    _answer(torch.cuda, "device_count", [], torch.cpu.device_count)
    _answer(torch.cuda, "set_device", ["device"], torch.cpu.set_device)
    _answer(torch.cuda, "synchronize", ["device"], torch.cpu.synchronize)
    _answer(torch.cuda, "stream", ["stream"], torch.cpu.stream)
    _answer(torch.cuda, "current_device", [], lambda: 0)
    _answer(torch.cuda, "current_stream", ["device"], lambda device=None: stream)
    _answer(torch.cuda, "get_device_capability", ["device"], lambda device=None: (8, 0))
    _answer(torch.cuda, "device_memory_used", ["device"], lambda device=None: 0)
    _answer(torch.cuda, "get_device_properties", ["device"], lambda device=None: properties)
    _answer(torch.cuda, "manual_seed", ["seed"], torch.default_generator.manual_seed)
    _answer(torch.cuda, "get_rng_state", ["device"], lambda device=None: torch.get_rng_state())
    _answer(torch.cuda, "set_rng_state", ["new_state", "device"], lambda state, device=None: torch.set_rng_state(state))


def _adapt_megatron_random(random) -> None:
    parameters = ["new_state", "device", "graph_safe"]
    _answer(
        random, "_set_cuda_rng_state", parameters, lambda new_state, *rest, **kwargs: torch.set_rng_state(new_state)
    )
    # In the CPU mode the tracker's fork changes the only CPU generator by design, so this warning is not shown.
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _adapt_megatron_training(initialize) -> None:
    """Let Megatron start without CUDA, also in scripts with a training loop of their own."""
    wrap(
        initialize,
        "initialize_megatron",
        ["allow_no_cuda"],
        lambda original: lambda *args, **kwargs: original(*args, **{"allow_no_cuda": True} | kwargs),
    )
    # This function warms up fused kernels, and would consume random numbers of the CPU generator. It has no parameters
    # in Megatron 0.18, and the parameter tp_size in later releases.
    _answer(initialize, "set_jit_fusion_options", [], lambda tp_size=None: None)


def _adapt_distributed_optimizer(optimizer) -> None:
    """Let Megatron's distributed optimizer resume with PyTorch's Adam. Megatron expects an Adam that needs a GPU."""

    def make_sharded(sharded_state_dict):
        def wrapped(self, model_sharded_state_dict, is_loading=False, *rest, **kwargs):
            if is_loading and not self.optimizer.state:
                # Megatron reads the number of steps from the states, and a new optimizer has no states yet.
                self._init_optimizer_states_with_dummy_values()
            return sharded_state_dict(self, model_sharded_state_dict, is_loading, *rest, **kwargs)

        return wrapped

    def make_load(load_state_dict):
        def wrapped(self, state_dict):
            # Megatron copies into fp32 parameters in place.
            with torch.no_grad():
                load_state_dict(self, state_dict)
            # Megatron gives all states the same step tensor, and each parameter would advance it.
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        return wrapped

    def make_set(set_states):
        # What Megatron loads for each parameter does not include the number of steps.
        @torch.no_grad()
        def wrapped(self, model_param, tensors):
            return set_states(self, model_param, {**tensors, "step": None})

        return wrapped

    wrap(optimizer, "sharded_state_dict", ["self", "model_sharded_state_dict", "is_loading"], make_sharded)
    wrap(optimizer, "load_state_dict", ["self", "state_dict"], make_load)
    wrap(optimizer, "_set_main_param_and_optimizer_states", ["self", "model_param", "tensors"], make_set)


def _adapt_megatron_saving(initialize, filesystem_async) -> None:
    # A spawned worker would import everything again without the CPU mode, and --async-save would hang.
    wrap(
        initialize,
        "init_persistent_async_worker",
        ["rank", "mp_mode"],
        lambda original: lambda rank, mp_mode="spawn": original(rank, "fork"),
    )
    wrap(
        filesystem_async,
        "get_write_results_queue",
        ["mp_mode"],
        lambda original: lambda mp_mode="spawn": original("fork"),
    )
    writer = filesystem_async.FileSystemWriterAsync
    _answer(writer, "preload_tensors", ["write_buckets", "non_blocking"], _copy_for_writing)


def _copy_for_writing(write_buckets, non_blocking=True):
    """Return the write buckets with copies of their tensors, so that training can go on while they are written.

    On a GPU, the move of the tensors to the host makes these copies.
    """
    return [
        (file, key, (objects, [(item, x.clone()) for item, x in tensors]))
        for file, key, (objects, tensors) in write_buckets
    ]


def _keep_rng_over_dataloader_start() -> None:
    """Restore the CPU generator after a data loader's iterator has drawn its seed from it, so that resumes stay exact.

    On a GPU, dropout uses another generator, and this seed changes nothing.
    """

    def make(start):
        def keeping(self, *args, **kwargs):
            state = torch.get_rng_state()
            start(self, *args, **kwargs)
            torch.set_rng_state(state)

        return keeping

    wrap(torch.utils.data.dataloader._BaseDataLoaderIter, "__init__", ["self", "loader"], make)
