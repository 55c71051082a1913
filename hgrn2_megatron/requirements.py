"""Check Megatron's flags before training: refuse those that HGRN2 cannot train with, and warn of those that do nothing.

docs/reference/refusals.md lists every refusal.
"""

import dataclasses
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from hgrn2_megatron import (
    cpu,
    cpu_requirements,
    cuda_graphs,
    fsdp,
    gpu_requirements,
    megatron_flags,
    muon,
    offloading,
    precision,
    sequence_requirements,
    stack_requirements,
)
from hgrn2_megatron.config import (
    ATTENTION,
    EXPERTS,
    HEAD,
    HGRN2Config,
    UsageError,
    has_experts,
)
from hgrn2_megatron.settings import Settings, global_args, megatron_release, refuse

PUBLISHED_BLOCK_EPS, PUBLISHED_MIXER_EPS = 1e-6, 1e-5


def check(settings: Settings, stack: bool = False) -> list[str]:
    """Refuse settings that cannot train HGRN2.

    Args:
        settings: Megatron's args, its TransformerConfig, or both.
        stack: True for a HybridModel, False for a GPT.

    Returns:
        Warnings about settings that train. They name values that published HGRN2 models do not have, and flags that
        have no effect in this model.

    Raises:
        UsageError: a setting cannot train HGRN2. The message names the flag to change.
    """
    hgrn2 = HGRN2Config.of_stack(settings, with_heads=True) if stack else HGRN2Config.of(settings)
    _check_block(settings, hgrn2)
    if stack:
        stack_requirements.check(settings)
    elif settings.num_layers:
        hgrn2.check_depth(settings.num_layers)
    of_form = stack_requirements.UNSUPPORTED if stack else UNSUPPORTED_IN_GPT
    _check_unsupported(settings, UNSUPPORTED + offloading.UNSUPPORTED + of_form)
    if settings.use_megatron_fsdp:
        refuse(settings, fsdp.NOT_WITH_FSDP, "--use-megatron-fsdp cannot be used with {}")
    cuda_graphs.check(settings, hgrn2)
    sequence_requirements.check(settings, hgrn2)
    _check_dimensions(settings, hgrn2)
    # All GPUs of a run are alike. The first check is before a rank has chosen its own.
    capability = torch.cuda.get_device_capability(0) if torch.cuda.is_available() else None
    precision.check(settings, capability)
    if capability:
        gpu_requirements.check(settings, hgrn2, capability)
    _check_loss(settings)
    if cpu.installed():
        refuse(settings, cpu_requirements.NEEDS_CUDA, "{} does not work on a machine without CUDA")
    return _warnings(settings, hgrn2, stack)


def check_without_spec(args) -> list[str]:
    """Refuse flags with which a run without HGRN2 layers would fail or surprise, because its --spec was forgotten.

    Args:
        args: Megatron's args.

    Returns:
        Warnings about flags of the plugin that do nothing.

    Raises:
        UsageError: the flags need --spec.
    """
    s = Settings(args)
    if s.hgrn2_loss_chunk_size is not None:
        raise UsageError(
            f"--hgrn2-loss-chunk-size {s.hgrn2_loss_chunk_size} would do nothing without --spec hgrn2: give the spec, "
            "or drop the flag"
        )
    if "M" in (s.hybrid_layer_pattern or "") and s.spec is None and not find_spec("mamba_ssm"):
        raise UsageError(
            "M in --hybrid-layer-pattern is Mamba without a --spec, and mamba-ssm is not installed: give --spec "
            "hgrn2_stack to train HGRN2, or install mamba-ssm"
        )
    settings = {field.name: getattr(s, f"hgrn2_{field.name}") for field in dataclasses.fields(HGRN2Config)}
    given = [name for name, value in settings.items() if value not in (None, getattr(HGRN2Config, name))]
    flags = ", ".join(f"--hgrn2-{name.replace('_', '-')}" for name in given)
    return [f"without --spec hgrn2 no layer is HGRN2, and these flags have no effect: {flags}"] if flags else []


def _check_block(s: Settings, hgrn2: HGRN2Config):
    """Check that the block around the mixer is an HGRN2 block."""
    if s.normalization != "RMSNorm":
        raise UsageError(
            f"--normalization is {s.normalization}, but an HGRN2 block uses RMSNorm: give --normalization RMSNorm"
        )
    if s.add_bias_linear:
        raise UsageError("the linear layers of an HGRN2 block have no biases: give --disable-bias-linear")
    if s.add_qkv_bias and ATTENTION not in hgrn2.layer_pattern:
        raise UsageError("--add-qkv-bias is for attention layers, and this model has none: drop the flag")
    gated = s.gated_linear_unit if s.gated_linear_unit is not None else s.swiglu
    silu = s.activation_func in (None, F.silu) and not s.quick_geglu and not s.squared_relu
    if not (gated and silu):
        raise UsageError(
            "the channel mixer of an HGRN2 block is a SiLU-gated linear unit, but the flags ask for another one: "
            "give --swiglu, and drop --quick-geglu and --squared-relu"
        )
    if s.glu_linear_offset or s.activation_func_clamp_value is not None:
        raise UsageError(
            "--glu-linear-offset and --activation-func-clamp-value change the SiLU-gated linear unit of an HGRN2 "
            "block: drop both flags"
        )
    if s.position_embedding_type in ("learned_absolute", "relative"):
        raise UsageError(
            f"--position-embedding-type is {s.position_embedding_type}, but HGRN2 has no learned positions: "
            "give none, or rope for the attention layers of a hybrid"
        )
    if s.apply_residual_connection_post_layernorm:
        raise UsageError(
            "--apply-residual-connection-post-layernorm takes the residual after the norm, but an HGRN2 block takes it "
            "before the norm: drop the flag"
        )
    if s.layernorm_zero_centered_gamma:
        raise UsageError("--apply-layernorm-1p is not supported with HGRN2 layers: drop the flag")


# Each row has a function that returns whether the settings ask for a feature, its flag, and what to do instead.
UNSUPPORTED = (
    (
        lambda s: s.mtp_hybrid_override_pattern,
        "--mtp-hybrid-override-pattern",
        "write each head behind a / at the end of a HybridModel's --hybrid-layer-pattern, as in 'M-M-*-/*-'",
    ),
    (lambda s: s.experimental_attention_variant, "--experimental-attention-variant", "drop the flag"),
    (
        lambda s: s.heterogeneous_layers_config_path or s.heterogeneous_layers_config_encoded_json,
        "--heterogeneous-layers-config-path or --heterogeneous-layers-config-encoded-json",
        "drop the flag",
    ),
    (lambda s: s.enable_mhc_connections, "--enable-mhc-connections", "drop the flag"),
    (
        lambda s: s.transformer_impl == "inference_optimized",
        "--transformer-impl inference_optimized",
        "give --transformer-impl local",
    ),
    (
        lambda s: s.external_cuda_graph or s.cuda_graph_impl == "transformer_engine",
        "--cuda-graph-impl transformer_engine",
        "give local or full_iteration, because a graph of Transformer Engine would give the lower bounds no gradient",
    ),
    (lambda s: s.use_torch_fsdp2, "--use-torch-fsdp2", "give --use-megatron-fsdp, which shards the same"),
    (
        # only Megatron's own loop has a number of iterations
        lambda s: s.hybrid_context_parallel and (s.train_iters or s.train_samples),
        "--hybrid-context-parallel in Megatron's own training loop",
        "give --context-parallel-size, because up to megatron-core 0.20-dev the loop stops at its first batch; a loop "
        "of your own can use the flag",
    ),
    (
        lambda s: s.reset_attention_mask,
        "--reset-attention-mask",
        "give --dataloader-inter-document-masking, because the recurrence reads no mask and would carry its state "
        "from one document into the next",
    ),
    (
        lambda s: s.reset_position_ids,
        "--reset-position-ids",
        "give --dataloader-inter-document-masking, because the recurrence reads no positions and would carry its state "
        "from one document into the next",
    ),
    (
        lambda s: s.fp32_residual_connection and (s.bf16 or s.fp16),
        "--fp32-residual-connection with --bf16 or --fp16",
        "drop the flag, because the linear layers of a 16-bit model do not take an fp32 input",
    ),
    (
        # only Megatron's own loop has a number of iterations
        lambda s: (
            (s.init_model_with_meta_device or s.perform_initialization is False)
            and (s.train_iters or s.train_samples)
            and not (s.load or s.pretrained_checkpoint or s.use_megatron_fsdp or s.use_torch_fsdp2)
        ),
        "--init-model-with-meta-device or --no-initialization, without --load",
        "drop the flag, because the weights would be whatever the memory holds",
    ),
    (
        lambda s: (
            s.load
            and s.ckpt_step
            and s.ckpt_format == "torch"
            and s.use_distributed_optimizer
            and not (s.no_load_optim or s.finetune)
        ),
        "--ckpt-step with --ckpt-format torch and --use-distributed-optimizer",
        "write the iteration into latest_checkpointed_iteration.txt instead, because Megatron would load the newest "
        "checkpoint's optimizer",
    ),
    (
        lambda s: s.freeze_all_layers and megatron_release() == (0, 19),
        "--freeze-all-layers on megatron-core 0.19",
        "give --lr 0, because that release trains the layers nonetheless",
    ),
    (
        lambda s: (
            (s.tensor_parallel_num_weight_shards or 1) > (s.tensor_model_parallel_size or 1)
            or (s.expert_tensor_parallel_num_weight_shards or 1)
            > (s.expert_tensor_parallel_size or s.tensor_model_parallel_size or 1)
        ),
        "--tensor-parallel-num-weight-shards or --expert-tensor-parallel-num-weight-shards",
        "give --use-distributed-optimizer or a larger --tensor-model-parallel-size, because such shards were never "
        "run with HGRN2 layers",
    ),
    (
        lambda s: s.batch_invariant_mode,
        "--batch-invariant-mode",
        "drop the flag, because a prompt and a step of generation sum up a state in different orders",
    ),
)
UNSUPPORTED_IN_GPT = (
    (
        lambda s: s.multi_latent_attention,
        "--multi-latent-attention in a GPT",
        "run pretrain_hybrid.py with + in --hybrid-layer-pattern and --spec hgrn2_megatron.spec hgrn2_stack",
    ),
    (
        lambda s: s.hybrid_layer_pattern,
        "--hybrid-layer-pattern in a GPT",
        "give --spec hgrn2_stack in pretrain_hybrid.py, or --hgrn2-layer-pattern in pretrain_gpt.py",
    ),
    (
        lambda s: (
            s.overlap_moe_expert_parallel_comm and not has_experts(s.moe_layer_freq or 1, (s.num_layers or 1) - 1)
        ),
        "--overlap-moe-expert-parallel-comm with a last layer that has no experts",
        "give a --moe-layer-freq that ends in 1, because Megatron would leave out the norm behind the last layer",
    ),
    (
        lambda s: s.mtp_num_layers,
        "--mtp-num-layers in a GPT",
        "run pretrain_hybrid.py with --spec hgrn2_stack and a --hybrid-layer-pattern that ends in a head, such as "
        "'M-M-M-*-/*-'",
    ),
)


def _check_unsupported(s: Settings, table: tuple):
    refuse(s, table, "{} cannot be used with HGRN2 layers")
    if s.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            raise UsageError(
                "--transformer-impl is transformer_engine, but Transformer Engine cannot be imported: "
                "install transformer-engine[pytorch], or give --transformer-impl local"
            )


def _check_dimensions(s: Settings, hgrn2: HGRN2Config):
    if s.hidden_size is None:
        return  # Megatron itself reports that the flag is missing
    tp = s.tensor_model_parallel_size or 1
    heads = hgrn2.num_heads(s.hidden_size)
    if heads % tp:
        raise UsageError(
            f"--tensor-model-parallel-size {tp} does not divide the {heads} HGRN2 heads "
            f"(--hidden-size {s.hidden_size} / --hgrn2-expand-ratio {hgrn2.expand_ratio}): change one of the three"
        )


# Features that cannot be used with --hgrn2-loss-chunk-size. The rows have the same parts as in UNSUPPORTED.
NOT_WITH_CHUNKED_LOSS = (
    (lambda s: s.cross_entropy_loss_fusion, "--cross-entropy-loss-fusion", "drop one of the two flags"),
    (lambda s: s.defer_embedding_wgrad_compute, "--defer-embedding-wgrad-compute", "drop one of the two flags"),
    (lambda s: s.fp8_output_proj, "--fp8-output-proj", "drop one of the two flags"),
    (
        lambda s: s.logit_dtype,
        "--output-logit-dtype",
        "drop it, because the loss is computed in fp32 from logits in the model's dtype",
    ),
    (
        # GPTModel would write PendingLogits
        lambda s: s.config_logger_dir and not s.hybrid_layer_pattern,
        "--config-logger-dir, which writes the logits of a GPT",
        "drop one of the two flags",
    ),
)


def _check_loss(s: Settings):
    size = s.hgrn2_loss_chunk_size
    if size is None:
        return
    if size < 1:
        raise UsageError(f"--hgrn2-loss-chunk-size is {size}, but a chunk has at least 1 token: give a larger number")
    refuse(s, NOT_WITH_CHUNKED_LOSS, "--hgrn2-loss-chunk-size cannot be used with {}")


def _warnings(s: Settings, hgrn2: HGRN2Config, stack: bool) -> list[str]:
    warnings = []
    if s.layernorm_epsilon != PUBLISHED_BLOCK_EPS:
        warnings.append(
            f"--norm-epsilon is {s.layernorm_epsilon}, but published HGRN2 models use {PUBLISHED_BLOCK_EPS}"
        )
    if hgrn2.norm_eps != PUBLISHED_MIXER_EPS:
        warnings.append(
            f"--hgrn2-norm-eps is {hgrn2.norm_eps}, but the published weight format allows only {PUBLISHED_MIXER_EPS}, "
            "so this model cannot be exported"
        )
    if about_muon := muon.warning(s, hgrn2):
        warnings.append(about_muon)
    if stack and (num_experts := s.num_moe_experts or s.num_experts) and EXPERTS not in s.hybrid_layer_pattern:
        warnings.append(
            f"--num-experts is {num_experts}, but no layer has experts: write E in the place of - in "
            "--hybrid-layer-pattern"
        )
    depth = 0 if stack else s.num_layers
    if depth and hgrn2.has_attention and hgrn2.num_hgrn2_layers(depth) == depth:
        warnings.append(
            f"--hgrn2-layer-pattern is {hgrn2.layer_pattern!r}, but no * falls on one of the {depth} layers: "
            "give more layers or a shorter pattern"
        )
    heads = stack and HEAD in s.hybrid_layer_pattern
    if idle := megatron_flags.without_effect(s, global_args(), hgrn2, stack, heads):
        warnings.append(f"these flags have no effect in this model: {', '.join(idle)}; see docs/reference/flags.md")
    return warnings
