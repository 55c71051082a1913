"""CUDA graphs: refuse settings that cannot be captured, and set up the pipeline's schedule for a capture.

docs/reference/cuda-graphs.md lists what can be captured.
"""

from megatron.core.transformer.enums import AttnBackend

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.settings import Settings, megatron_release, refuse


def _experts_wait_for_the_host(s: Settings) -> bool:
    """Return whether a graph would hold experts without a capacity, whose number of tokens the host must know."""
    if not (s.num_moe_experts or s.num_experts):
        return False
    padded = s.moe_expert_capacity_factor and s.moe_pad_expert_input_to_capacity
    modules = {getattr(module, "name", module) for module in s.cuda_graph_modules or []}
    only_around_experts = s.cuda_graph_impl == "local" and modules and modules <= {"moe_router", "moe_preprocess"}
    return not (padded or only_around_experts)


def _own_modules_would_train(s: Settings) -> bool:
    """Return whether graphs of layers would train with Megatron's own modules.

    The gradients are then NaN on Megatron 0.19. Most likely it frees the input of a captured layer, because it does not
    see that PyTorch's RMSNorm saves this input for the backward.
    """
    trains = s.train_iters or s.train_samples
    return bool(s.cuda_graph_impl == "local" and s.transformer_impl == "local" and trains)


def _stages_are_not_captured(s: Settings) -> bool:
    """Return whether Megatron would capture the layers of these pipeline stages wrongly, or not at all.

    Megatron stops at tensors that micro-batches share, such as the positions of attention layers. Megatron 0.20-dev
    adds up the gradients of the first micro-batch only.
    """
    stages = s.cuda_graph_impl == "local" and (s.pipeline_model_parallel_size or 1) > 1
    return stages and (s.has_attention or megatron_release() >= (0, 20))


def _fused_attention_multiple(s: Settings) -> int:
    """Return the number that must divide the sequence length because of fused attention in a graph.

    cuDNN up to 9.15 is wrong in graphs of training at lengths that are not a multiple of 128. Transformer Engine takes
    another kernel at such lengths, but only in graphs of layers, and not under context parallelism, which cuts the
    sequence into two chunks per rank. The number is 1 where another kernel is taken or attention is never fused.
    """
    cp = s.context_parallel_size or 1
    may_be_fused = s.transformer_impl != "local" and s.attention_backend != AttnBackend.unfused
    has_no_other_kernel = s.cuda_graph_impl == "full_iteration" or cp > 1
    if not (s.has_attention and may_be_fused and has_no_other_kernel):
        return 1
    return 128 * (2 * cp if cp > 1 else 1)


# Features that cannot be used with --cuda-graph-impl. The functions read the run's settings and those of HGRN2Config.
NOT_WITH_CUDA_GRAPHS = (
    (lambda s: s.sft, "--sft", "drop one of the two flags, because document boundaries change from batch to batch"),
    (
        lambda s: s.dataloader_inter_document_masking,
        "--dataloader-inter-document-masking",
        "drop one of the two flags, because document boundaries change from batch to batch",
    ),
    (
        lambda s: s.hybrid_context_parallel,
        "--hybrid-context-parallel",
        "drop one of the two flags, because the ranks of a document change from batch to batch",
    ),
    (
        _experts_wait_for_the_host,
        "--num-experts without a capacity",
        "give --moe-expert-capacity-factor and --moe-pad-expert-input-to-capacity, or --cuda-graph-impl local "
        "--cuda-graph-modules moe_router",
    ),
    (
        _own_modules_would_train,
        "--transformer-impl local",
        "give transformer_engine, or --cuda-graph-impl full_iteration, because the gradients could be NaN",
    ),
    (
        _stages_are_not_captured,
        "--pipeline-model-parallel-size above 1, with attention layers or from megatron-core 0.20 on",
        "give --cuda-graph-impl full_iteration",
    ),
    (
        lambda s: s.fine_grained_activation_offloading,
        "--fine-grained-activation-offloading",
        "drop one of the two flags, because the two were never run together",
    ),
    (
        lambda s: s.overlap_moe_expert_parallel_comm,
        "--overlap-moe-expert-parallel-comm",
        "drop one of the two flags, because its schedule calls parts of a layer, which no graph captures",
    ),
    (
        lambda s: (s.seq_length or 0) % _fused_attention_multiple(s),
        "fused attention layers at this --seq-length",
        "give a multiple of 128, or with context parallelism a multiple of 256 times --context-parallel-size",
    ),
)


def check(s: Settings, hgrn2: HGRN2Config):
    """Refuse settings that cannot be used with the CUDA graphs they ask for.

    Args:
        s: settings of this run.
        hgrn2: HGRN2 settings. The layer pattern tells whether the model has attention layers.

    Raises:
        UsageError: a setting cannot be used with `--cuda-graph-impl`. The message names its flag.
    """
    if s.cuda_graph_impl not in (None, "none"):
        why = f"--cuda-graph-impl {s.cuda_graph_impl} cannot be used with {{}}"
        refuse(Settings(hgrn2, s), NOT_WITH_CUDA_GRAPHS, why)


def settle(config) -> None:
    """Change the config so that the pipeline's schedule works with CUDA graphs, if the config asks for them.

    Args:
        config: Megatron's TransformerConfig, which the schedule reads in every step.
    """
    if config.cuda_graph_impl == "none":
        return
    # A stage's output is a view of its graph's memory. It cannot be freed, and the schedule would raise an error.
    config.deallocate_pipeline_outputs = False
    # With this on, the host waits after batched sends, which older PyTorch needs. A capture does not allow the host to
    # wait.
    config.batch_p2p_sync = False
