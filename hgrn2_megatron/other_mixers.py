"""Layer specs of Megatron's token mixers that only a HybridModel has: multi-latent attention and gated delta nets."""

import copy
import dataclasses

from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from hgrn2_megatron.layer import final_norm, stock_layers, with_mixer


def layers(config: TransformerConfig, dense: ModuleSpec) -> dict[str, ModuleSpec]:
    """Return the layers of these token mixers that Megatron can build with this config.

    Args:
        config: Megatron's TransformerConfig of a HybridModel.
        dense: spec of an attention layer with an MLP.

    Returns:
        Name in HybridStackSubmodules -> spec of a layer, of which only the token mixer's half is of use.
    """
    specs = {"gdn_layer": _delta_layer(with_mixer(dense, config), config)}
    return specs | {"mla_layer": _latent_layer(config)} if config.multi_latent_attention else specs


class _LatentCoreAttention(DotProductAttention):
    """Megatron's own attention for heads whose values have another width than their keys.

    Multi-latent attention passes both widths, and Megatron's own class takes neither. Megatron builds this module first
    without the widths, and then again with them.
    """

    def __init__(self, *args, k_channels: int | None = None, v_channels: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_query_groups_per_partition = self.num_attention_heads_per_partition
        self.hidden_size_per_partition = (v_channels or 0) * self.num_attention_heads_per_partition


class _LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention with the gradients that its own column-parallel layers need.

    All heads share the rotary part of the keys, and each tensor-parallel rank has only the gradient of its own heads.
    Megatron sums these gradients where the part is sharded over the sequence, as Transformer Engine's layers leave it.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if self.config.sequence_parallel:
            whole = gather_from_tensor_model_parallel_region(kv_combined, self.tp_group)
            kv_combined = scatter_to_sequence_parallel_region(whole, self.tp_group)
        return q_compressed, kv_combined


def _latent_layer(config: TransformerConfig) -> ModuleSpec:
    one = copy.copy(config)
    one.num_layers, one.moe_layer_freq = 1, [0]
    (spec,) = stock_layers(one)
    if config.transformer_impl == "transformer_engine":
        return spec
    attention = spec.submodules.self_attention
    parts = attention.submodules
    if parts.core_attention is DotProductAttention:
        parts = dataclasses.replace(parts, core_attention=_LatentCoreAttention)
    attention = dataclasses.replace(attention, module=_LatentAttention, submodules=parts)
    spec.submodules = dataclasses.replace(spec.submodules, self_attention=attention)
    return spec


def _delta_layer(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Return the spec of an HGRN2 layer with a gated delta net in the place of the HGRN2 mixer.

    Both mixers have an in_proj behind the layer's norm and an out_proj, with the same names in a checkpoint.
    """
    projections = spec.submodules.self_attention.submodules
    parts = GatedDeltaNetSubmodules(
        in_proj=projections.in_proj, out_norm=final_norm(config), out_proj=projections.out_proj
    )
    mixer = ModuleSpec(module=GatedDeltaNet, submodules=parts)
    return ModuleSpec(module=TransformerLayer, submodules=dataclasses.replace(spec.submodules, self_attention=mixer))
