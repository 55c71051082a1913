"""CUDA graphs: refuse what Megatron cannot capture, and set what a capture needs of the pipeline's schedule."""

from megatron.core.transformer.enums import AttnBackend

from hgrn2_megatron.config import ATTENTION, HGRN2Config
from hgrn2_megatron.settings import Settings, megatron_release, refuse


def _experts_wait_for_the_host(s: Settings) -> bool:
    """Whether a graph would hold experts that take as many tokens as there are, which the host must know."""
    if not (s.num_moe_experts or s.num_experts):
        return False
    padded = s.moe_expert_capacity_factor and s.moe_pad_expert_input_to_capacity
    modules = {getattr(module, "name", module) for module in s.cuda_graph_modules or []}
    around = s.cuda_graph_impl == "local" and modules and modules <= {"moe_router", "moe_preprocess"}
    return not (padded or around)


def _own_modules_would_train(s: Settings) -> bool:
    """Whether graphs of layers would train Megatron's own modules, whose norms it does not see save their inputs."""
    trains = s.train_iters or s.train_samples
    return bool(s.cuda_graph_impl == "local" and s.transformer_impl == "local" and trains)


def _stages_are_not_captured(s: Settings) -> bool:
    """Whether graphs of layers would be of pipeline stages that Megatron captures wrongly, or not at all.

    It stops at what micro-batches share, the positions of attention layers; and 0.20-dev adds up the gradients of the
    first micro-batch alone.
    """
    stages = s.cuda_graph_impl == "local" and (s.pipeline_model_parallel_size or 1) > 1
    return stages and (ATTENTION in s.layer_pattern or megatron_release() >= (0, 20))


def _fused_attention_multiple(s: Settings) -> int:
    """What the length must be a multiple of for fused attention in a graph; 1 where none is bound to be there.

    cuDNN up to 9.15 is wrong in graphs of training at lengths that are no multiple of 128. Transformer Engine knows,
    but takes another kernel for graphs of layers alone, and has none for context parallelism, which cuts the sequence
    into two pieces a rank.
    """
    cp = s.context_parallel_size or 1
    may_be_fused = s.transformer_impl != "local" and s.attention_backend != AttnBackend.unfused
    is_bound_to = s.cuda_graph_impl == "full_iteration" or cp > 1
    if not (ATTENTION in s.layer_pattern and may_be_fused and is_bound_to):
        return 1
    return 128 * (2 * cp if cp > 1 else 1)


# What does not go with --cuda-graph-impl: a test of the settings, the flag, and what to do instead. The settings have
# the fields of HGRN2Config too.
NOT_WITH_CUDA_GRAPHS = (
    (lambda s: s.sft, "--sft", "every batch has other borders of documents"),
    (
        lambda s: s.dataloader_inter_document_masking,
        "--dataloader-inter-document-masking",
        "every batch has other borders of documents",
    ),
    (
        _experts_wait_for_the_host,
        "--num-experts of any number of tokens",
        "give --moe-expert-capacity-factor and --moe-pad-expert-input-to-capacity, or --cuda-graph-impl local "
        "--cuda-graph-modules moe_router",
    ),
    (
        _own_modules_would_train,
        "--transformer-impl local",
        "Megatron would free what the backward reads; give transformer_engine, or --cuda-graph-impl full_iteration",
    ),
    (
        _stages_are_not_captured,
        "--pipeline-model-parallel-size above 1, with attention layers or from megatron-core 0.20 on",
        "give --cuda-graph-impl full_iteration",
    ),
    (
        lambda s: (s.seq_length or 0) % _fused_attention_multiple(s),
        "fused attention layers at such a --seq-length",
        "give a multiple of 128, under context parallelism of 256 x --context-parallel-size",
    ),
)


def check(s: Settings, hgrn2: HGRN2Config):
    """Refuse settings that do not go with the CUDA graphs they ask for.

    Args:
        s: settings of this run.
        hgrn2: HGRN2 part of the model, whose layer pattern says whether there is attention.

    Raises:
        UsageError: it names the flag that does not go with `--cuda-graph-impl`.
    """
    if s.cuda_graph_impl not in (None, "none"):
        why = f"--cuda-graph-impl {s.cuda_graph_impl} does not go with {{}}"
        refuse(Settings(hgrn2, s), NOT_WITH_CUDA_GRAPHS, why)


def settle(config) -> None:
    """Where CUDA graphs are asked for, set what they need of the pipeline's schedule.

    Args:
        config: Megatron's, which the schedule reads in every step.
    """
    if config.cuda_graph_impl == "none":
        return
    # a stage's output is a view of its graph's memory: there is nothing to free, and the schedule would insist
    config.deallocate_pipeline_outputs = False
    # a wait of the host, for the batched sends of older PyTorch; a capture allows none
    config.batch_p2p_sync = False
