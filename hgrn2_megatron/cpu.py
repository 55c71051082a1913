"""Megatron's training loop on a machine without a GPU, over gloo. A no-op where CUDA is there.

Megatron spells its device "cuda" in literals, so the device is faked below it: a TorchFunctionMode turns that name
into "cpu" for every tensor, and the functions of torch.cuda that the loop calls answer for the CPU.
`torch.cuda.is_available()` stays False, because torch's own code would otherwise look for a driver.
"""

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

# parser defaults of a CPU run: attribute -> value
DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}

# (whether the settings ask for it, the flag, what to do instead), as in requirements.py: what stops a CPU run with an
# error that names no flag, or does nothing in it
NEEDS_CUDA = (
    (lambda s: s.distributed_backend == "nccl", "--distributed-backend nccl", "give gloo, or drop it"),
    (lambda s: s.transformer_impl == "transformer_engine", "--transformer-impl transformer_engine", "give local"),
    (lambda s: s.fp8, "--fp8-format", "give --bf16"),
    (
        lambda s: s.enable_cuda_graph or s.cuda_graph_impl not in (None, "none"),
        "--cuda-graph-impl",
        "drop it",
    ),
    (lambda s: s.optimizer_cuda_graph, "--optimizer-cuda-graph", "drop it"),
    (lambda s: s.cpu_offloading_num_layers, "--cpu-offloading-num-layers", "drop it: all is on the CPU"),
    (lambda s: s.optimizer_cpu_offload, "--optimizer-cpu-offload", "drop it: all is on the CPU"),
    (lambda s: s.use_precision_aware_optimizer, "--use-precision-aware-optimizer", "drop it"),
    (lambda s: s.tp_comm_overlap, "--tp-comm-overlap", "drop it"),
    (lambda s: s.nccl_ub, "--use-nccl-ub", "drop it"),
    (lambda s: s.use_sharp, "--use-sharp", "drop it"),
    (lambda s: s.moe_permute_fusion, "--moe-permute-fusion", "drop it"),
    (lambda s: s.moe_router_fusion, "--moe-router-fusion", "drop it"),
    (
        lambda s: s.moe_token_dispatcher_type == "flex" or s.moe_enable_deepep,
        "--moe-token-dispatcher-type flex",
        "give allgather or alltoall",
    ),
    (lambda s: s.use_te_activation_func, "--use-te-activation-func", "drop it"),
    (lambda s: s.use_transformer_engine_op_fuser, "--use-transformer-engine-op-fuser", "drop it"),
    (lambda s: s.fused_residual_rmsnorm, "--fused-residual-rmsnorm", "drop it"),
    (lambda s: s.symmetric_ar_type, "--symmetric-ar-type", "drop it"),
    (lambda s: s.batch_invariant_mode, "--batch-invariant-mode", "drop it"),
    (lambda s: s.gpu_sniff_test_interval, "--gpu-sniff-test-interval", "drop it"),
    (lambda s: s.record_memory_history, "--record-memory-history", "drop it"),
    (lambda s: s.profile and not s.use_pytorch_profiler, "--profile", "give --use-pytorch-profiler too"),
)


def needed() -> bool:
    """Whether this machine has no CUDA device."""
    return not torch.cuda.is_available()


def installed() -> bool:
    """Return whether the CPU mode is on in this process."""
    return getattr(install, "done", False)


def install() -> None:
    """Switch the CPU mode on, once. Call it before anything imports Megatron, which decides then what to compile."""
    if not needed() or installed():
        return
    install.done = True
    # torch.compile on the host compiles C++ for half a minute; Megatron asks for one connection under TP
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # torch._dynamo indexes torch functions by identity when Megatron first imports it: patch after that
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
    _adapt_megatron_random(megatron.core.tensor_parallel.random)
    _adapt_megatron_training(megatron.training.initialize)
    _adapt_distributed_optimizer(megatron.core.optimizer.distrib_optimizer.DistributedOptimizer)
    # an assertion before tensors are sent
    _answer(megatron.core.inference.communication_utils, "_is_cuda", ["tensor"], lambda tensor: None)
    _adapt_megatron_saving(megatron.training.initialize, megatron.core.dist_checkpointing.strategies.filesystem_async)
    _keep_rng_over_dataloader_start()
    if os.environ.get("RANK", "0") == "0":
        print("hgrn2_megatron: no CUDA device, running on the CPU over gloo", file=sys.stderr, flush=True)


def _names_cuda(device) -> bool:
    # torch.cuda.current_device() below is 0, so a bare int is a CUDA ordinal too
    return device is not None and (type(device) is int or str(device).startswith("cuda"))


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites the device of every torch call made under it."""

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
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            # Megatron's optimizers sort parameters by these names, and know those of CUDA tensors
            result = result.replace("torch.", "torch.cuda.", 1)
        return result


def _under_mode(original: Callable) -> Callable:
    def under_mode(*args, **kwargs):
        with _CudaMeansCpu():
            return original(*args, **kwargs)

    return under_mode


def _keep_mode_in_backward() -> None:
    """Turn the mode on in the backward. A mode is off while it handles a call, and torch.autograd.backward is one."""
    wrap(torch.autograd, "_engine_run_backward", ["t_outputs", "args", "kwargs"], _under_mode)


def _keep_mode_in_threads() -> None:
    """Turn the mode on in new threads, each of which has its own: Megatron's text generation server starts some."""
    wrap(threading.Thread, "run", ["self"], _under_mode)


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
    """Megatron's text generation makes one by the number of a device."""

    def __new__(cls, device=None):
        return super().__new__(cls)


def _answer(owner: Any, name: str, parameters: list[str], answer: Callable) -> None:
    """Replace `owner.name`, whose parameters are checked, by `answer`, which does not call the original."""
    wrap(owner, name, parameters, lambda original: lambda *args, **kwargs: answer(*args, **kwargs))


def _fake_torch_cuda() -> None:
    # Unchecked: torch.Generator is a type of C without a signature, so there is nothing to compare. Its subclass takes
    # the one argument that Megatron gives, and hands nothing on.
    torch.Generator = _Generator
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
    # the tracker's fork moves the one CPU generator by design here
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _adapt_megatron_training(initialize) -> None:
    """Let Megatron start without CUDA, also from scripts that have a loop of their own."""
    wrap(
        initialize,
        "initialize_megatron",
        ["allow_no_cuda"],
        lambda original: lambda *args, **kwargs: original(*args, **{"allow_no_cuda": True} | kwargs),
    )
    # This warms fused kernels up, and would draw from the CPU's random numbers. It has no parameters in Megatron 0.18.
    # Later releases have tp_size.
    _answer(initialize, "set_jit_fusion_options", [], lambda tp_size=None: None)


def _adapt_distributed_optimizer(optimizer) -> None:
    """Let Megatron's distributed optimizer resume with PyTorch's Adam; Megatron tries others, which need a GPU."""

    def make_sharded(sharded_state_dict):
        def wrapped(self, model_sharded_state_dict, is_loading=False, *rest, **kwargs):
            if is_loading and not self.optimizer.state:
                # Megatron reads the number of steps from the states, which a new optimizer does not have yet
                self._init_optimizer_states_with_dummy_values()
            return sharded_state_dict(self, model_sharded_state_dict, is_loading, *rest, **kwargs)

        return wrapped

    def make_load(load_state_dict):
        def wrapped(self, state_dict):
            # Megatron copies into fp32 parameters in place
            with torch.no_grad():
                load_state_dict(self, state_dict)
            # and gives all states one tensor that counts their steps, which each of them would advance
            for state in self.optimizer.state.values():
                state["step"] = state["step"].clone()

        return wrapped

    def make_set(set_states):
        # the number of steps is not among what is loaded for each parameter
        return lambda self, model_param, tensors: set_states(self, model_param, {**tensors, "step": None})

    wrap(optimizer, "sharded_state_dict", ["self", "model_sharded_state_dict", "is_loading"], make_sharded)
    wrap(optimizer, "load_state_dict", ["self", "state_dict"], make_load)
    wrap(optimizer, "_set_main_param_and_optimizer_states", ["self", "model_param", "tensors"], make_set)


def _adapt_megatron_saving(initialize, filesystem_async) -> None:
    # a worker of another start method imports everything anew, and without the CPU mode: --async-save hangs
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
    """What is to be saved, copied before training goes on, which on a GPU the move to the host does."""
    return [
        (file, key, (objects, [(item, x.clone()) for item, x in tensors]))
        for file, key, (objects, tensors) in write_buckets
    ]


def _keep_rng_over_dataloader_start() -> None:
    """An iterator draws a seed from the CPU generator, which on a GPU no dropout sees; keep resumes exact."""

    def make(start):
        def keeping(self, *args, **kwargs):
            state = torch.get_rng_state()
            start(self, *args, **kwargs)
            torch.set_rng_state(state)

        return keeping

    wrap(torch.utils.data.dataloader._BaseDataLoaderIter, "__init__", ["self", "loader"], make)
