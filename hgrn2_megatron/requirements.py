"""What an HGRN2 model needs of Megatron's other flags, and what is not supported yet: refused before training.

docs/flags.md is the same table for people.
"""

import torch.nn.functional as F

from hgrn2_megatron import cpu, cuda_graphs, megatron_flags
from hgrn2_megatron.config import ATTENTION, EXPERTS, PIPE, HGRN2Config, UsageError, stages_fit
from hgrn2_megatron.settings import Settings, global_args, refuse

PUBLISHED_BLOCK_EPS, PUBLISHED_MIXER_EPS = 1e-6, 1e-5


def check(settings: Settings, stack: bool = False) -> list[str]:
    """Refuse what cannot train HGRN2.

    Args:
        settings: Megatron's args, its TransformerConfig, or both.
        stack: whether they are those of a HybridModel instead of a GPT.

    Returns:
        Warnings: what trains, but cannot be exported as a published HGRN2 checkpoint, or does nothing.

    Raises:
        UsageError: naming the flag to change.
    """
    hgrn2 = HGRN2Config.of_stack(settings) if stack else HGRN2Config.of(settings)
    _check_block(settings, hgrn2)
    if stack:
        _check_stages(settings)
    _check_unsupported(settings, UNSUPPORTED + (UNSUPPORTED_IN_STACK if stack else UNSUPPORTED_IN_GPT))
    cuda_graphs.check(settings, hgrn2)
    _check_packing(settings, hgrn2)
    _check_context_parallel(settings, hgrn2)
    _check_dimensions(settings, hgrn2)
    _check_loss(settings, stack)
    if cpu.installed():
        refuse(settings, cpu.NEEDS_CUDA, "{} does not work on a machine without CUDA")
    return _warnings(settings, hgrn2, stack)


def _check_block(s: Settings, hgrn2: HGRN2Config):
    """The block around the mixer: what makes it an HGRN2 block."""
    if s.normalization != "RMSNorm":
        raise UsageError(
            f"--normalization {s.normalization}: an HGRN2 block uses RMSNorm; give --normalization RMSNorm"
        )
    if s.add_bias_linear:
        raise UsageError("an HGRN2 block has no linear biases: give --disable-bias-linear")
    if s.add_qkv_bias and ATTENTION not in hgrn2.layer_pattern:
        raise UsageError("--add-qkv-bias: an HGRN2 layer has no biases; drop the flag")
    gated = s.gated_linear_unit if s.gated_linear_unit is not None else s.swiglu
    silu = s.activation_func in (None, F.silu) and not s.quick_geglu and not s.squared_relu
    if not (gated and silu):
        raise UsageError(
            "the channel mixer of HGRN2 is a SiLU-gated linear unit: give --swiglu, "
            "without --quick-geglu or --squared-relu"
        )
    if s.position_embedding_type in ("learned_absolute", "relative"):
        raise UsageError(
            f"--position-embedding-type {s.position_embedding_type}: HGRN2 has no learned positions; "
            "give none, or rope for the attention layers of a hybrid"
        )
    if s.apply_residual_connection_post_layernorm:
        raise UsageError("--apply-residual-connection-post-layernorm is another block than HGRN2's; drop it")
    if s.layernorm_zero_centered_gamma:
        raise UsageError("--apply-layernorm-1p is not supported with HGRN2 layers; drop it")


# (whether the settings ask for it, the flag, what to do instead)
UNSUPPORTED = (
    (
        lambda s: s.multi_latent_attention,
        "--multi-latent-attention",
        "use grouped-query attention in a hybrid",
    ),
    (lambda s: s.mtp_num_layers, "--mtp-num-layers", "drop it"),
    (lambda s: s.experimental_attention_variant, "--experimental-attention-variant", "drop it"),
    (
        lambda s: s.heterogeneous_layers_config_path or s.heterogeneous_layers_config_encoded_json,
        "--heterogeneous-layers-config-path or --heterogeneous-layers-config-encoded-json",
        "drop it",
    ),
    (lambda s: s.enable_mhc_connections, "--enable-mhc-connections", "drop it"),
    (
        lambda s: s.transformer_impl == "inference_optimized",
        "--transformer-impl inference_optimized",
        "use local",
    ),
    (
        lambda s: s.external_cuda_graph or s.cuda_graph_impl == "transformer_engine",
        "--cuda-graph-impl transformer_engine",
        "give local or full_iteration: its graphs of a layer would give the lower bounds no gradient",
    ),
    (lambda s: s.use_megatron_fsdp, "--use-megatron-fsdp", "use --use-distributed-optimizer"),
    (lambda s: s.use_torch_fsdp2, "--use-torch-fsdp2", "use --use-distributed-optimizer"),
    (lambda s: s.hybrid_context_parallel, "--hybrid-context-parallel", "drop it"),
    (
        lambda s: s.reset_attention_mask,
        "--reset-attention-mask",
        "the recurrence sees no mask, so documents would leak into each other unnoticed: give "
        "--dataloader-inter-document-masking",
    ),
    (
        lambda s: s.reset_position_ids,
        "--reset-position-ids",
        "the recurrence has no positions, so documents would leak into each other unnoticed: give "
        "--dataloader-inter-document-masking",
    ),
    (
        # nothing of a mixer would be offloaded
        lambda s: s.fine_grained_activation_offloading,
        "--fine-grained-activation-offloading",
        "recompute instead, with --recompute-granularity selective or full",
    ),
    (lambda s: s.delay_wgrad_compute, "--delay-wgrad-compute", "drop it"),
    (lambda s: s.overlap_moe_expert_parallel_comm, "--overlap-moe-expert-parallel-comm", "drop it"),
    (lambda s: s.fp4, "--fp4-format", "use --fp8-format or bf16"),
)
UNSUPPORTED_IN_GPT = (
    (
        lambda s: s.hybrid_layer_pattern,
        "--hybrid-layer-pattern in a GPT",
        "mix layers with --hgrn2-layer-pattern, or give pretrain_hybrid.py --spec hgrn2_megatron.spec hgrn2_stack",
    ),
)
UNSUPPORTED_IN_STACK = (
    # HybridModel would train without positions
    (lambda s: s.position_embedding_type == "mrope", "--position-embedding-type mrope in a HybridModel", "give rope"),
    (
        lambda s: EXPERTS in s.hybrid_layer_pattern and not (s.num_moe_experts or s.num_experts),
        "E in --hybrid-layer-pattern without --num-experts",
        "give it, or write - for an MLP",
    ),
)


def _check_unsupported(s: Settings, table: tuple):
    refuse(s, table, "{} is not supported with HGRN2 layers yet")
    if s.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            raise UsageError(
                "--transformer-impl transformer_engine, but Transformer Engine cannot be imported: "
                "install transformer-engine[pytorch], or give --transformer-impl local"
            )


def _check_stages(s: Settings):
    """The `|` of a HybridModel's pattern, of which Megatron would speak as of an interleaved schedule."""
    stages = s.pipeline_model_parallel_size or 1
    if not stages_fit(s.hybrid_layer_pattern, stages):
        raise UsageError(
            f"--hybrid-layer-pattern {s.hybrid_layer_pattern!r} has {s.hybrid_layer_pattern.count(PIPE) + 1} segments "
            f"for --pipeline-model-parallel-size {stages}: write one segment a stage, or as many for each of them; "
            "one stage takes no |"
        )


def _check_packing(s: Settings, hgrn2: HGRN2Config):
    if not (s.sft or s.dataloader_inter_document_masking):
        return
    flag = "--sft" if s.sft else "--dataloader-inter-document-masking"
    if has_own_attention(s, hgrn2):
        raise UsageError(
            f"{flag} packs sequences, which Megatron's own attention does not take: give --transformer-impl "
            "transformer_engine, or a layer pattern without attention"
        )
    if (s.pipeline_model_parallel_size or 1) > 1 and (s.micro_batch_size or 1) > 1:
        raise UsageError(
            f"{flag} makes one sequence of a micro-batch, and Megatron's pipeline hands on the shape of several: "
            "give --micro-batch-size 1"
        )


def _check_context_parallel(s: Settings, hgrn2: HGRN2Config):
    if (s.context_parallel_size or 1) == 1:
        return
    if has_own_attention(s, hgrn2):
        raise UsageError(
            "--context-parallel-size above 1: Megatron's own attention does not take it; give --transformer-impl "
            "transformer_engine, or a layer pattern without attention"
        )
    if ATTENTION in hgrn2.layer_pattern and s.dataloader_inter_document_masking and not s.sft:
        raise UsageError(
            "--dataloader-inter-document-masking with --context-parallel-size above 1 deals out the whole stream, and "
            "Megatron's attention takes documents to be cut one by one: use a layer pattern without attention"
        )


def has_own_attention(s: Settings, hgrn2: HGRN2Config) -> bool:
    """Whether there are attention layers of Megatron's own modules, which do not take what Transformer Engine's do."""
    return ATTENTION in hgrn2.layer_pattern and s.transformer_impl == "local"


def _check_dimensions(s: Settings, hgrn2: HGRN2Config):
    if s.hidden_size is None:
        return  # Megatron itself says that it is missing
    tp = s.tensor_model_parallel_size or 1
    heads = hgrn2.num_heads(s.hidden_size)
    if heads % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp} does not divide the {heads} HGRN2 heads "
            f"(--hidden-size {s.hidden_size} / --hgrn2-expand-ratio {hgrn2.expand_ratio}): change one of them"
        )
    if s.fp8:
        multiple = 32 if s.fp8_recipe == "mxfp8" else 16
        local = s.hidden_size // tp
        if local % multiple:
            raise UsageError(
                f"--fp8-format {s.fp8} ({s.fp8_recipe}) needs the {local} channels of a TP rank to be a multiple "
                f"of {multiple}: change --hidden-size {s.hidden_size} or --tensor-model-parallel-size {tp}"
            )


# what --hgrn2-loss-chunk-size does not go with, as above
NOT_WITH_CHUNKED_LOSS = (
    (lambda s: s.cross_entropy_loss_fusion, "--cross-entropy-loss-fusion", "drop one of them"),
    (lambda s: s.defer_embedding_wgrad_compute, "--defer-embedding-wgrad-compute", "drop one of them"),
    (lambda s: s.fp8_output_proj, "--fp8-output-proj", "drop one of them"),
    (lambda s: s.logit_dtype, "--output-logit-dtype", "drop it: the loss is computed in fp32 from the model's dtype"),
    (
        lambda s: (s.tensor_parallel_num_weight_shards or 1) > (s.tensor_model_parallel_size or 1),
        "--tensor-parallel-num-weight-shards",
        "drop one of them",
    ),
)


def _check_loss(s: Settings, stack: bool):
    size = s.hgrn2_loss_chunk_size
    if size is None:
        return
    if size < 1:
        raise UsageError(f"--hgrn2-loss-chunk-size must be at least 1, got {size}")
    if stack:
        raise UsageError(
            "--hgrn2-loss-chunk-size is for a GPT, and Megatron's HybridModel computes its loss itself: drop it, "
            "or give pretrain_gpt.py --spec hgrn2"
        )
    refuse(s, NOT_WITH_CHUNKED_LOSS, "--hgrn2-loss-chunk-size does not go with {}")


def _warnings(s: Settings, hgrn2: HGRN2Config, stack: bool) -> list[str]:
    warnings = []
    if s.layernorm_epsilon != PUBLISHED_BLOCK_EPS:
        warnings.append(f"--norm-epsilon is {s.layernorm_epsilon}; published HGRN2 models use {PUBLISHED_BLOCK_EPS}")
    if hgrn2.norm_eps != PUBLISHED_MIXER_EPS:
        warnings.append(
            f"--hgrn2-norm-eps is {hgrn2.norm_eps}; the published weight format has no place for another "
            f"than {PUBLISHED_MIXER_EPS}, so this model cannot be exported"
        )
    idle = megatron_flags.without_effect(s, global_args(), ATTENTION in hgrn2.layer_pattern, stack)
    if idle:
        warnings.append(f"no effect in this model: {', '.join(idle)}; docs/flags.md says where each has one")
    return warnings
