"""Check the layer pattern of a HybridModel, and the flags that do not go with its layers."""

import importlib.util

from hgrn2_megatron.config import (
    ATTENTION,
    DELTA_NET,
    EXPERTS,
    HEAD,
    LATENT_ATTENTION,
    PIPE,
    UsageError,
    split_heads,
    stages_fit,
)
from hgrn2_megatron.settings import Settings, megatron_release

# The rows have the same parts as those of UNSUPPORTED in requirements.py.
UNSUPPORTED = (
    # HybridModel does not know mrope and would train without positions
    (lambda s: s.position_embedding_type == "mrope", "--position-embedding-type mrope in a HybridModel", "give rope"),
    (
        lambda s: EXPERTS in s.hybrid_layer_pattern and not (s.num_moe_experts or s.num_experts),
        "an E in --hybrid-layer-pattern without --num-experts",
        "give --num-experts, or write - for an MLP",
    ),
    (
        lambda s: LATENT_ATTENTION in s.hybrid_layer_pattern and megatron_release() < (0, 19),
        "a + in --hybrid-layer-pattern before megatron-core 0.19",
        "install megatron-core 0.19 or later, or write * for attention",
    ),
    (
        lambda s: LATENT_ATTENTION in s.hybrid_layer_pattern and not s.multi_latent_attention,
        "a + in --hybrid-layer-pattern without --multi-latent-attention",
        "build the model from an HGRN2MLATransformerConfig",
    ),
    (
        lambda s: s.multi_latent_attention and LATENT_ATTENTION not in s.hybrid_layer_pattern,
        "--multi-latent-attention without a + in --hybrid-layer-pattern",
        "write + for each layer of multi-latent attention, or drop the flag",
    ),
    (
        lambda s: s.multi_latent_attention and ATTENTION in s.hybrid_layer_pattern,
        "a * beside a + in --hybrid-layer-pattern",
        "write only one of the two, because Megatron gives * no positions in a model with multi-latent attention",
    ),
    (
        lambda s: s.multi_latent_attention and s.position_embedding_type not in (None, "none", "rope"),
        "a + in --hybrid-layer-pattern with --position-embedding-type yarn",
        "give none, because layers of multi-latent attention make positions of their own by --rope-type",
    ),
    (
        lambda s: (
            {LATENT_ATTENTION, DELTA_NET} & {*s.hybrid_layer_pattern}
            and (s.tensor_model_parallel_size or 1) > 1
            and not s.sequence_parallel
        ),
        "a + or G in --hybrid-layer-pattern with --tensor-model-parallel-size above 1 and without --sequence-parallel",
        "give --sequence-parallel, without which Megatron does not sum the gradients of weights that all heads share",
    ),
    (
        # Megatron moves the labels of the heads along the ranks of --context-parallel-size
        lambda s: s.hybrid_context_parallel and HEAD in s.hybrid_layer_pattern,
        "--hybrid-context-parallel with a / in --hybrid-layer-pattern",
        "drop the heads behind the /, because their labels would come from other ranks than those of the batch",
    ),
    (
        lambda s: s.overlap_moe_expert_parallel_comm or s.delay_wgrad_compute,
        "--overlap-moe-expert-parallel-comm and --delay-wgrad-compute in a HybridModel",
        "drop the flags, because HybridModel has no such schedule, or run pretrain_gpt.py with --spec hgrn2 and "
        "--hgrn2-layer-pattern",
    ),
    (
        lambda s: s.cpu_offloading or s.cpu_offloading_num_layers,
        "--cpu-offloading-num-layers in a HybridModel",
        "give --fine-grained-activation-offloading, because Megatron would offload nothing",
    ),
    (
        lambda s: s.mla_down_proj_fusion and s.transformer_impl == "local",
        "--mla-down-proj-fusion with --transformer-impl local",
        "drop one of the two flags",
    ),
    (
        lambda s: DELTA_NET in s.hybrid_layer_pattern and importlib.util.find_spec("fla") is None,
        "a G in --hybrid-layer-pattern without the package flash-linear-attention",
        "install the package, or write M for an HGRN2 layer",
    ),
)


def check(settings: Settings) -> None:
    """Refuse a layer pattern that does not fit the pipeline stages or the heads of multi-token prediction.

    Args:
        settings: Megatron's args, its TransformerConfig, or both, with a `hybrid_layer_pattern` of known symbols.

    Raises:
        UsageError: the pattern does not fit. The message names the flag to change.
    """
    main, heads = split_heads(settings.hybrid_layer_pattern)
    _check_stages(settings, main)
    _check_heads(settings, heads)


def _check_heads(s: Settings, heads: list[str]):
    """Check the heads of multi-token prediction. Megatron would build those of the pattern, whatever the flag says."""
    if s.mtp_num_layers and s.mtp_num_layers != len(heads):
        raise UsageError(
            f"--mtp-num-layers is {s.mtp_num_layers}, but --hybrid-layer-pattern {s.hybrid_layer_pattern!r} has "
            f"{len(heads)} heads: write each head behind a / at the end of the pattern, as in 'M-M-*-/*-', and drop "
            "--mtp-num-layers"
        )
    if heads and s.dataloader_inter_document_masking and not s.sft and (s.context_parallel_size or 1) > 1:
        raise UsageError(
            f"--dataloader-inter-document-masking with --context-parallel-size {s.context_parallel_size} divides the "
            "whole stream of documents among the ranks, but Megatron's multi-token prediction expects each document to "
            "be divided by itself: drop the heads behind the / in --hybrid-layer-pattern, or one of the two flags"
        )


def _check_stages(s: Settings, main: str):
    """Check the `|` of a HybridModel's pattern. Megatron's own error would be about an interleaved schedule."""
    stages = s.pipeline_model_parallel_size or 1
    if not stages_fit(main, stages):
        raise UsageError(
            f"--hybrid-layer-pattern {s.hybrid_layer_pattern!r} has {main.count(PIPE) + 1} segments "
            f"for --pipeline-model-parallel-size {stages}: write one segment per stage, or the same number of segments "
            "for each stage, and no | for a single stage"
        )
