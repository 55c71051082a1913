"""Table of Megatron's flags for attention, Mamba and layers: an HGRN2 model takes, refuses or ignores each of them.

requirements.py refuses flags, and prints one warning that names the given flags without effect.
docs/reference/flags.md has the same table.
"""

import argparse
import dataclasses
import enum
import functools
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from hgrn2_megatron.config import DELTA_NET, LATENT_ATTENTION, HGRN2Config


class Effect(enum.Enum):
    """The models and layers in which a flag has an effect."""

    EVERYWHERE = "taken"
    ATTENTION = "taken by attention layers"
    ATTENTION_OF_GPT = "taken by attention layers of a GPT"
    LATENT_ATTENTION = "taken by multi-latent attention"
    DELTA_NET = "taken by gated delta nets"
    GPT = "taken in a GPT"
    HEADS = "taken by heads of a HybridModel"
    NOWHERE = "no effect"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class Row:
    """Group of flags that have the same effect.

    Attributes:
        names: Megatron's attributes. Some exist only in some supported releases.
        effect: models and layers in which the flags have an effect.
        what: phrase that tells a user what the flags set.
    """

    names: tuple[str, ...]
    effect: Effect
    what: str


def _row(effect: Effect, what: str, names: str) -> Row:
    return Row(tuple(names.split()), effect, what)


TABLE = (
    _row(
        Effect.ATTENTION,
        "number and size of attention heads",
        "group_query_attention num_query_groups kv_channels",
    ),
    _row(Effect.EVERYWHERE, "number of attention heads; Megatron requires this flag", "num_attention_heads"),
    _row(
        Effect.ATTENTION,
        "normalization and clipping of queries and keys",
        "qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold apply_wd_to_qk_layernorm "
        "log_max_attention_logit",
    ),
    _row(
        Effect.ATTENTION,
        "softmax, windows and output gate of attention",
        "softmax_type attention_softmax_in_fp32 apply_query_key_layer_scaling attention_dropout window_size "
        "window_attn_skip_freq attention_output_gate mup_attn_scale_power mup_base_head_dim",
    ),
    _row(
        Effect.ATTENTION,
        "biases of queries, keys and values; refused in a model without attention layers",
        "add_qkv_bias",
    ),
    _row(
        Effect.ATTENTION,
        "attention kernels, and how context parallelism splits attention",
        "attention_backend flash_attention_version use_kitchen_attention kitchen_attention_backend flash_decode "
        "cp_comm_type hierarchical_context_parallel_sizes",
    ),
    _row(Effect.EVERYWHERE, "whether Muon takes the projections of a token mixer one by one", "muon_split_qkv"),
    _row(
        Effect.ATTENTION,
        "rotary positions; learned_absolute and relative are refused",
        "position_embedding_type use_rotary_position_embeddings rotary_base rotary_percent rotary_interleaved "
        "rotary_seq_len_interpolation_factor no_rope_freq rotary_scaling_factor mscale mscale_all_dim "
        "yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_correction_range_round_to_int",
    ),
    _row(
        Effect.ATTENTION_OF_GPT,
        "rotary positions that HybridModel ignores; it refuses --position-embedding-type mrope",
        "use_rope_scaling rope_scaling_factor mrope_section",
    ),
    _row(
        Effect.EVERYWHERE,
        "longest position, position embedding, and fusions that only attention layers use",
        "max_position_embeddings add_position_embedding apply_rope_fusion masked_softmax_fusion",
    ),
    _row(
        Effect.NOWHERE,
        "attention that Megatron no longer has, and positions that are refused",
        "use_flash_attn relative_attention_num_buckets relative_attention_max_distance",
    ),
    _row(
        Effect.EVERYWHERE,
        "multi-latent attention at each + of a HybridModel, which turns the flag on; refused in a GPT",
        "multi_latent_attention",
    ),
    _row(
        Effect.LATENT_ATTENTION,
        "details of multi-latent attention",
        "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim cache_mla_latents mla_down_proj_fusion "
        "rope_type",
    ),
    _row(Effect.REFUSED, "sparse and linear attention", "experimental_attention_variant"),
    _row(
        Effect.NOWHERE,
        "details of sparse attention",
        "dsa_indexer_n_heads dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss "
        "dsa_indexer_topk_freq dsa_indexer_skip_topk_offset dsa_kernel_backend dsa_indexer_rope_interleaved "
        "dsa_indexer_rotate_activation dsa_indexer_scoring_relu dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32",
    ),
    _row(
        Effect.DELTA_NET,
        "details of gated delta nets",
        "linear_conv_kernel_dim linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads",
    ),
    _row(
        Effect.NOWHERE,
        "linear attention in a GPT, and gated delta products",
        "linear_attention_freq gdp_num_householder gdp_cutedsl_kernel gdp_num_chunk_states_to_recompute",
    ),
    _row(
        Effect.NOWHERE,
        "Mamba layers, which HGRN2 layers replace",
        "mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads use_mamba_mem_eff_path "
        "mamba_training_ssm_states_dtype mamba_inference_conv_states_dtype",
    ),
    _row(
        Effect.EVERYWHERE,
        "recurrent states in the dynamic engine, which refuses every dtype except fp32",
        "mamba_inference_ssm_states_dtype inference_dynamic_batching_mamba_memory_ratio "
        "inference_dynamic_batching_prefix_caching_mamba_gb",
    ),
    _row(
        Effect.EVERYWHERE,
        "number of layers, how pipeline stages divide them, and whether they are frozen",
        "num_layers encoder_num_layers decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
        "num_layers_per_virtual_pipeline_stage freeze_all_layers",
    ),
    _row(Effect.NOWHERE, "number of layers in T5's decoder", "decoder_num_layers"),
    _row(Effect.GPT, "layers that have experts; a HybridModel has E in its pattern instead", "moe_layer_freq"),
    _row(
        Effect.EVERYWHERE,
        "layers of a HybridModel, with HGRN2 layers by the first name only; refused in a GPT",
        "hybrid_layer_pattern hybrid_override_pattern is_hybrid_model",
    ),
    _row(Effect.EVERYWHERE, "model to build", "spec"),
    _row(Effect.REFUSED, "YAML file with flags, from which Megatron reads no spec", "yaml_cfg"),
    _row(
        Effect.REFUSED,
        "layers that differ from each other, and several residual streams",
        "heterogeneous_layers_config_path heterogeneous_layers_config_encoded_json enable_mhc_connections",
    ),
    _row(
        Effect.NOWHERE,
        "details of several residual streams",
        "mhc_num_residual_streams mhc_sinkhorn_iterations mhc_init_gating_factor mhc_recompute_layer_num",
    ),
    _row(
        Effect.EVERYWHERE,
        "number of heads of multi-token prediction, as in --hybrid-layer-pattern; refused in a GPT",
        "mtp_num_layers",
    ),
    _row(
        Effect.HEADS,
        "details of multi-token prediction",
        "mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads mtp_hsm",
    ),
    _row(Effect.REFUSED, "older place for the layers of a head", "mtp_hybrid_override_pattern"),
    _row(Effect.NOWHERE, "pipeline stages of a GPT that hold heads alone", "mtp_standalone"),
    _row(
        Effect.REFUSED,
        "attention masks and positions that start again at each document",
        "reset_attention_mask reset_position_ids",
    ),
    _row(
        Effect.EVERYWHERE,
        "attention mask from the data loader, which the launcher turns off by default",
        "create_attention_mask_in_dataloader",
    ),
)

# Megatron replaces these names of dtypes while it validates its args.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def command_line() -> dict[str, argparse.Action]:
    """Return Megatron's flags: attribute -> argparse action, with the defaults of this run."""
    import megatron.training.arguments

    parser = argparse.ArgumentParser(allow_abbrev=False)
    megatron.training.arguments.add_megatron_arguments(parser)
    return {action.dest: action for action in parser._actions}


def without_effect(
    settings: Any, args: argparse.Namespace | None, hgrn2: HGRN2Config, stack: bool, heads: bool = False
) -> list[str]:
    """Return the flags that the user gives but that have no effect in this model.

    A flag counts as given if its value differs from the default.

    Args:
        settings: Megatron's TransformerConfig, or an object with its attributes. It is read if `args` is None.
        args: Megatron's args, or None where only megatron.core is used.
        hgrn2: HGRN2 settings. The layer pattern tells which token mixers the model has.
        stack: True for a HybridModel, False for a GPT.
        heads: whether the model has heads of multi-token prediction.
    """
    taken = {Effect.EVERYWHERE, Effect.REFUSED}
    taken |= {Effect.ATTENTION} if hgrn2.has_attention else set()
    taken |= {Effect.LATENT_ATTENTION} if LATENT_ATTENTION in hgrn2.layer_pattern else set()
    taken |= {Effect.DELTA_NET} if DELTA_NET in hgrn2.layer_pattern else set()
    taken |= set() if stack else {Effect.GPT}
    taken |= {Effect.HEADS} if heads else set()
    taken |= {Effect.ATTENTION_OF_GPT} if hgrn2.has_attention and not stack else set()
    names = [name for row in TABLE if row.effect not in taken for name in row.names]
    if args is None:
        fields = TransformerConfig.__dataclass_fields__
        given = [name for name in names if name in fields and _is_given(settings, name, fields[name].default)]
        return [f"--{name.replace('_', '-')}" for name in given]
    flags = command_line()
    given = [name for name in names if name in flags and _is_given(args, name, flags[name].default)]
    return [flags[name].option_strings[0] for name in given]


def _is_given(settings: Any, name: str, default: Any) -> bool:
    value = getattr(settings, name, None)
    if value is None or value == default or isinstance(default, str) and value == DTYPES.get(default):
        return False
    match name:
        # Megatron or the launcher sets these values if the user gives none.
        case "kv_channels":
            # Megatron itself reports that one of the other two is missing
            sizes = settings.hidden_size, settings.num_attention_heads
            return None not in sizes and value != sizes[0] // sizes[1]
        case "num_query_groups":
            return value != settings.num_attention_heads
        case "position_embedding_type":
            return value != "none"
        case "attention_dropout":
            return value != 0
    return True
