"""Megatron's training loop on a machine without a GPU, over gloo. A no-op where CUDA is there.

Megatron spells its device "cuda" in literals, so the device is faked below it: a TorchFunctionMode turns that name
into "cpu" for every tensor, and the functions of torch.cuda that the loop calls answer for the CPU.
`torch.cuda.is_available()` stays False, because torch's own code would otherwise look for a driver.
"""

import functools
import logging
import os
import sys
import threading
import types

import torch
from torch.overrides import TorchFunctionMode

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
    _adapt_megatron_training(megatron.training)
    _adapt_distributed_optimizer(megatron.core.optimizer.distrib_optimizer.DistributedOptimizer)
    # an assertion before tensors are sent
    megatron.core.inference.communication_utils._is_cuda = lambda tensor: None
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


def _keep_mode_in_backward() -> None:
    """A mode is off while it handles a call, and torch.autograd.backward is one, with all that runs in it."""
    run_backward = torch.autograd._engine_run_backward

    def under_mode(*args, **kwargs):
        with _CudaMeansCpu():
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = under_mode


def _keep_mode_in_threads() -> None:
    """A mode is its thread's own; Megatron's text generation server answers each request in a new one."""
    run = threading.Thread.run

    def under_mode(self):
        with _CudaMeansCpu():
            run(self)

    threading.Thread.run = under_mode


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


def _fake_torch_cuda() -> None:
    torch.Generator = _Generator
    for name in ("device_count", "set_device", "synchronize", "stream"):
        setattr(torch.cuda, name, getattr(torch.cpu, name))
    stream = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.device_memory_used = lambda device=None: 0
    torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        name="cpu", major=8, minor=0, total_memory=0, multi_processor_count=1
    )
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    for module in (torch.cuda, torch.cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def _adapt_megatron_random(random) -> None:
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    # the tracker's fork moves the one CPU generator by design here
    logging.getLogger(random.__name__).addFilter(lambda r: "CPU RNG state changed" not in r.getMessage())


def _adapt_megatron_training(package) -> None:
    initialize = functools.partial(package.initialize.initialize_megatron, allow_no_cuda=True)
    # Megatron's loop and scripts that have one of their own
    for module in (package, package.initialize, package.training):
        module.initialize_megatron = initialize
    # a warm-up of fused kernels that would draw from the CPU's random numbers
    package.training.set_jit_fusion_options = lambda *args, **kwargs: None


def _adapt_distributed_optimizer(optimizer) -> None:
    """Let Megatron's distributed optimizer resume with PyTorch's Adam; Megatron tries others, which need a GPU."""
    sharded_state_dict, load_state_dict = optimizer.sharded_state_dict, optimizer.load_state_dict
    set_states = optimizer._set_main_param_and_optimizer_states

    @functools.wraps(sharded_state_dict)
    def sharded(self, model_sharded_state_dict, is_loading=False, *rest, **kwargs):
        if is_loading and not self.optimizer.state:
            # Megatron reads the number of steps from the states, which a new optimizer does not have yet
            self._init_optimizer_states_with_dummy_values()
        return sharded_state_dict(self, model_sharded_state_dict, is_loading, *rest, **kwargs)

    @functools.wraps(load_state_dict)
    def load(self, state_dict):
        # Megatron copies into fp32 parameters in place
        with torch.no_grad():
            load_state_dict(self, state_dict)
        # and gives all states one tensor that counts their steps, which each of them would advance
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    @functools.wraps(set_states)
    def set_own(self, model_param, tensors):
        # the number of steps is not among what is loaded for each parameter
        set_states(self, model_param, {**tensors, "step": None})

    optimizer.sharded_state_dict, optimizer.load_state_dict = sharded, load
    optimizer._set_main_param_and_optimizer_states = set_own


def _adapt_megatron_saving(initialize, filesystem_async) -> None:
    # a worker of another start method imports everything anew, and without the CPU mode: --async-save hangs
    start_worker, results_queue = initialize.init_persistent_async_worker, filesystem_async.get_write_results_queue
    initialize.init_persistent_async_worker = lambda rank, mp_mode: start_worker(rank, "fork")
    filesystem_async.get_write_results_queue = lambda mp_mode="spawn": results_queue("fork")
    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(_copy_for_writing)


def _copy_for_writing(write_buckets, non_blocking=True):
    """What is to be saved, copied before training goes on, which on a GPU the move to the host does."""
    return [
        (file, key, (objects, [(item, x.clone()) for item, x in tensors]))
        for file, key, (objects, tensors) in write_buckets
    ]


def _keep_rng_over_dataloader_start() -> None:
    """An iterator draws a seed from the CPU generator, which on a GPU no dropout sees; keep resumes exact."""
    iterator = torch.utils.data.dataloader._BaseDataLoaderIter
    start = iterator.__init__

    @functools.wraps(start)
    def keeping(self, *args, **kwargs):
        state = torch.get_rng_state()
        start(self, *args, **kwargs)
        torch.set_rng_state(state)

    iterator.__init__ = keeping
