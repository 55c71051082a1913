"""Refusals of packed sequences and of context parallelism."""

from hgrn2_megatron.config import DELTA_NET, PIPE, HGRN2Config, UsageError, split_heads
from hgrn2_megatron.settings import Settings, refuse


def check(s: Settings, hgrn2: HGRN2Config):
    """Refuse packed sequences and context parallelism where the layers or Megatron's scripts do not take them.

    Raises:
        UsageError: a setting is refused. The message names the flag to change.
    """
    _check_packing(s, hgrn2)
    _check_context_parallel(s, hgrn2)


# The rows have the same parts as in requirements.py.
NOT_PACKED_IN_A_PIPELINE = (
    (lambda s: (s.micro_batch_size or 1) > 1, "--micro-batch-size", "give --micro-batch-size 1"),
    (lambda s: (s.eval_micro_batch_size or 1) > 1, "--eval-micro-batch-size", "give --eval-micro-batch-size 1"),
)


def _check_packing(s: Settings, hgrn2: HGRN2Config):
    if not (s.sft or s.dataloader_inter_document_masking):
        return
    flag = "--sft" if s.sft else "--dataloader-inter-document-masking"
    if has_own_attention(s, hgrn2):
        raise UsageError(
            f"{flag} packs sequences, which Megatron's own attention layers do not support: give --transformer-impl "
            "transformer_engine, or a layer pattern without attention"
        )
    if (s.pipeline_model_parallel_size or 1) > 1:
        refuse(
            s,
            NOT_PACKED_IN_A_PIPELINE,
            f"{flag} packs a micro-batch into one sequence, which no pipeline takes with {{}} above 1",
        )
        if not s.sft and _has_middle_stages(s):
            raise UsageError(
                f"{flag} needs the boundaries of documents on each pipeline stage, and Megatron gives none to stages "
                "that are neither the first nor the last: give --pipeline-model-parallel-size 2 without virtual stages"
            )


def _has_middle_stages(s: Settings) -> bool:
    """Return whether a pipeline has a stage, or a virtual stage, that is neither its first nor its last."""
    virtual = (
        s.num_layers_per_virtual_pipeline_stage,
        (s.num_virtual_stages_per_pipeline_rank or 1) > 1,
        (s.virtual_pipeline_model_parallel_size or 1) > 1,
        split_heads(s.hybrid_layer_pattern or "")[0].count(PIPE) > 1,
    )
    return s.pipeline_model_parallel_size > 2 or any(virtual)


def _check_context_parallel(s: Settings, hgrn2: HGRN2Config):
    if (s.context_parallel_size or 1) == 1:
        return
    if has_own_attention(s, hgrn2):
        raise UsageError(
            f"--context-parallel-size is {s.context_parallel_size}, but Megatron's own attention layers support only "
            "1: give --transformer-impl transformer_engine, or a layer pattern without attention"
        )
    if (hgrn2.has_attention or DELTA_NET in hgrn2.layer_pattern) and s.dataloader_inter_document_masking and not s.sft:
        raise UsageError(
            f"--dataloader-inter-document-masking with --context-parallel-size {s.context_parallel_size} divides the "
            "whole stream of documents among the ranks, but attention layers and gated delta nets expect each document "
            "to be divided by itself: give a layer pattern without them"
        )


def has_own_attention(s: Settings, hgrn2: HGRN2Config) -> bool:
    """Return whether the model has attention layers of Megatron's own, which support less than Transformer Engine's."""
    return hgrn2.has_attention and s.transformer_impl == "local"
