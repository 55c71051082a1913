"""The flags that a machine without a GPU does not take."""

from hgrn2_megatron.config import DELTA_NET, EXPERTS, PIPE, has_experts, split_heads
from hgrn2_megatron.settings import Settings


def _gathers_unequal_parts(s: Settings) -> bool:
    """Return whether data-parallel ranks, or those of context parallelism, send each other the weights they update."""
    model_ranks = (s.tensor_model_parallel_size or 1) * (s.pipeline_model_parallel_size or 1)
    divided = s.use_distributed_optimizer or s.use_layer_wise_distributed_optimizer or s.optimizer == "dist_muon"
    return bool(divided) and s.optimizer not in (None, "adam", "sgd") and (s.world_size or 1) > model_ranks


def _saves_a_stage_without_experts(s: Settings) -> bool:
    """Return whether a run saves or loads the optimizer of experts on a pipeline stage that has none."""
    stages = s.pipeline_model_parallel_size or 1
    if stages == 1 or (s.expert_model_parallel_size or 1) == 1 or not (s.save or s.load):
        return False
    parts = stages * (s.num_virtual_stages_per_pipeline_rank or 1)
    if s.hybrid_layer_pattern:
        main, heads = split_heads(s.hybrid_layer_pattern)
        layers, segments = [symbol == EXPERTS for symbol in main], main.split(PIPE)
        chunks = [EXPERTS in segment for segment in segments] if len(segments) > 1 else _divided(layers, parts)
        chunks[-1] = chunks[-1] or EXPERTS in "".join(heads)
    else:
        layers = [has_experts(s.moe_layer_freq or 1, layer) for layer in range(s.num_layers or 0)]
        per_chunk = s.num_layers_per_virtual_pipeline_stage
        chunks = _divided(layers, len(layers) // per_chunk if per_chunk else parts)
    return any(chunks) and not all(any(chunks[stage::stages]) for stage in range(stages))


def _divided(layers: list[bool], parts: int) -> list[bool]:
    """Return whether each of several equal parts of the layers has experts."""
    size = max(1, len(layers) // parts)
    return [any(layers[start : start + size]) for start in range(0, len(layers), size)]


def _gathers_unequal_tokens(s: Settings) -> bool:
    """Return whether tensor-parallel ranks of experts send each other the tokens that each of them got."""
    if s.moe_token_dispatcher_type != "alltoall" or s.expert_tensor_parallel_size == 1:
        return False
    return (s.expert_model_parallel_size or 1) > 1 and (s.tensor_model_parallel_size or 1) > 1


# Settings that would stop a CPU run with an error that names no flag, or would have no effect in it. Each row has a
# function that returns whether the settings ask for a feature, its flag, and what to do instead, as in requirements.py.
NEEDS_CUDA = (
    (lambda s: s.distributed_backend == "nccl", "--distributed-backend nccl", "give gloo, because NCCL needs GPUs"),
    (
        lambda s: s.transformer_impl == "transformer_engine",
        "--transformer-impl transformer_engine",
        "give local, because Transformer Engine needs a GPU",
    ),
    (
        lambda s: DELTA_NET in (s.hybrid_layer_pattern or ""),
        "a G in --hybrid-layer-pattern",
        "write M for an HGRN2 layer, because gated delta nets need a GPU",
    ),
    (lambda s: s.fp8, "--fp8-format", "give --bf16, because FP8 needs a GPU"),
    (
        lambda s: s.enable_cuda_graph or s.cuda_graph_impl not in (None, "none"),
        "--cuda-graph-impl",
        "drop the flag, because a CPU has no CUDA graphs",
    ),
    (lambda s: s.optimizer_cuda_graph, "--optimizer-cuda-graph", "drop the flag, because a CPU has no CUDA graphs"),
    (
        lambda s: s.cpu_offloading_num_layers,
        "--cpu-offloading-num-layers",
        "drop the flag, because everything is on the CPU",
    ),
    (lambda s: s.optimizer_cpu_offload, "--optimizer-cpu-offload", "drop the flag, because everything is on the CPU"),
    (
        lambda s: s.use_precision_aware_optimizer,
        "--use-precision-aware-optimizer",
        "drop the flag, because it needs Transformer Engine",
    ),
    (lambda s: s.tp_comm_overlap, "--tp-comm-overlap", "drop the flag, because it needs Transformer Engine"),
    (lambda s: s.nccl_ub, "--use-nccl-ub", "drop the flag, because it needs NCCL"),
    (
        lambda s: s.save_activations_interval or s.save_dgrads_interval,
        "--save-activations-interval or --save-dgrads-interval",
        "drop the flag, because it needs Transformer Engine",
    ),
    (
        lambda s: (s.num_distributed_optimizer_instances or 1) > 1 and s.overlap_grad_reduce,
        "--num-distributed-optimizer-instances with --overlap-grad-reduce",
        "drop one of the two flags, because gloo does not do the two sums of gradients in their order",
    ),
    (
        lambda s: s.ckpt_fully_parallel_load_exchange_algo == "gather_rounds",
        "--ckpt-fully-parallel-load-exchange-algo gather_rounds",
        "give broadcast, because gloo gathers only tensors of one shape",
    ),
    (lambda s: s.use_sharp, "--use-sharp", "drop the flag, because it needs NCCL"),
    (lambda s: s.moe_permute_fusion, "--moe-permute-fusion", "drop the flag, because it needs a GPU"),
    (lambda s: s.moe_router_fusion, "--moe-router-fusion", "drop the flag, because it needs a GPU"),
    (
        lambda s: s.moe_token_dispatcher_type == "flex" or s.moe_enable_deepep,
        "--moe-token-dispatcher-type flex",
        "give allgather or alltoall, because the flex dispatcher needs a GPU",
    ),
    (
        _gathers_unequal_tokens,
        "--moe-token-dispatcher-type alltoall with --tensor-model-parallel-size and --expert-model-parallel-size",
        "give allgather, or --expert-tensor-parallel-size 1, because gloo gathers only tensors of one shape",
    ),
    (
        _saves_a_stage_without_experts,
        "--expert-model-parallel-size with a pipeline stage that has no experts, and --save or --load,",
        "give each stage a layer of experts, or train without --save and --load, because Megatron cannot save an "
        "optimizer without states",
    ),
    (lambda s: s.moe_routing_trace_path, "--moe-routing-trace-path", "drop the flag, because it needs a GPU"),
    (
        lambda s: s.use_te_activation_func,
        "--use-te-activation-func",
        "drop the flag, because it needs Transformer Engine",
    ),
    (
        lambda s: s.use_transformer_engine_op_fuser,
        "--use-transformer-engine-op-fuser",
        "drop the flag, because it needs Transformer Engine",
    ),
    (lambda s: s.fused_residual_rmsnorm, "--fused-residual-rmsnorm", "drop the flag, because it needs a GPU"),
    (lambda s: s.symmetric_ar_type, "--symmetric-ar-type", "drop the flag, because it needs a GPU"),
    (
        lambda s: s.gpu_sniff_test_interval,
        "--gpu-sniff-test-interval",
        "drop the flag, because there is no GPU to test",
    ),
    (lambda s: s.record_memory_history, "--record-memory-history", "drop the flag, because there is no GPU memory"),
    (
        lambda s: s.log_memory_to_tensorboard,
        "--log-memory-to-tensorboard",
        "drop the flag, because there is no GPU memory",
    ),
    (
        lambda s: s.profile and not s.use_pytorch_profiler,
        "--profile",
        "give --use-pytorch-profiler too, because Megatron's other profiler needs CUDA",
    ),
    (
        _gathers_unequal_parts,
        "--use-distributed-optimizer with --optimizer muon on several data-parallel or context-parallel ranks",
        "drop --use-distributed-optimizer, because gloo cannot gather weights of different sizes",
    ),
)
