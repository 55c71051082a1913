"""Specs of a stack's layers: HGRN2 or attention, dense or expert, of Transformer Engine's or Megatron's modules."""

import dataclasses

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    get_transformer_layer_offset,
)

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.mixer import HGRN2Mixer, HGRN2MixerSubmodules
from hgrn2_megatron.norm import LocalRMSNorm


def transformer_block_submodules(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """Return the layer specs of one pipeline stage's TransformerBlock, and its final norm.

    Starts from the layers Megatron itself would build (attention with a dense MLP or experts, by its own flags)
    and puts the HGRN2 mixer where the layer pattern says so.

    Args:
        config: Megatron's, already checked by `requirements.check`.
        vp_stage: virtual pipeline stage, or None.
        pp_rank: pipeline rank.
    """
    hgrn2 = HGRN2Config.of(config)
    stock = stock_layers(config)
    offset = get_transformer_layer_offset(config, vp_stage, pp_rank)
    specs = []
    for layer in range(offset, offset + get_num_layers_to_build(config, vp_stage, pp_rank)):
        spec = stock[layer]
        if hgrn2.is_hgrn2_layer(layer):
            spec = with_mixer(spec, config)
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=final_norm(config))


def _has_experts(config: TransformerConfig, layer: int) -> bool:
    """Return whether experts are the channel mixer of `layer` (0-based over all layers)."""
    if not config.num_moe_experts:
        return False
    frequency = config.moe_layer_freq
    return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])


def _use_te(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def final_norm(config: TransformerConfig):
    """Builder of the norm behind the last layer."""
    return TESpecProvider().layer_norm() if _use_te(config) else LocalRMSNorm


def stock_layers(config: TransformerConfig) -> list[ModuleSpec]:
    """The attention layers that Megatron itself would build for the whole model, with norms that know SP."""
    use_te = _use_te(config)
    specs = get_gpt_decoder_layer_specs(
        config, use_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    return specs if use_te else [_with_norms(spec, _has_experts(config, layer)) for layer, spec in enumerate(specs)]


def _with_norms(spec: ModuleSpec, experts: bool) -> ModuleSpec:
    keys_map = dict(spec.submodules.sharded_state_dict_keys_map)
    if experts:
        # Transformer Engine fuses no norm into experts, and saves it under its own name
        keys_map.pop("pre_mlp_layernorm.")
    norms = dict(input_layernorm=LocalRMSNorm, pre_mlp_layernorm=LocalRMSNorm)
    submodules = dataclasses.replace(spec.submodules, **norms, sharded_state_dict_keys_map=keys_map)
    return ModuleSpec(module=spec.module, submodules=submodules)


class _WithBound:
    """A layer whose lower bound is an input of its CUDA graph, where Megatron captures each layer by itself.

    The graph's backward gives gradients to its inputs and to the layer's own parameters alone, and the bounds' table is
    the stack's. The bound takes the place of attention_bias, which Megatron hands on to the mixer.
    """

    def __call__(self, *args, **kwargs):
        # in generation nobody wants a gradient, and the graph makes the bound itself
        if self.config.cuda_graph_impl == "local" and kwargs.get("inference_context") is None:
            kwargs["attention_bias"] = self.self_attention.lower_bound()
        return super().__call__(*args, **kwargs)


class HGRN2Layer(_WithBound, TransformerLayer):
    """Megatron's layer with an HGRN2 mixer."""


class HGRN2MoELayer(_WithBound, MoETransformerLayer):
    """Megatron's layer of experts with an HGRN2 mixer."""


WITH_BOUND = {TransformerLayer: HGRN2Layer, MoETransformerLayer: HGRN2MoELayer}


def with_mixer(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """The same layer with the HGRN2 mixer in the place of self attention."""
    use_te, submodules = _use_te(config), spec.submodules
    backend = TESpecProvider() if use_te else LocalSpecProvider()
    # Transformer Engine fuses the input norm into in_proj; the separate norm is saved under the fused one's
    # name, as Megatron does for attention, so that checkpoints of both implementations interchange
    in_proj = backend.column_parallel_layer_norm_linear() if use_te else backend.column_parallel_linear()
    keys_map = {} if use_te else {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
    submodules = dataclasses.replace(
        submodules,
        self_attention=ModuleSpec(
            module=HGRN2Mixer,
            submodules=HGRN2MixerSubmodules(in_proj=in_proj, out_proj=backend.row_parallel_linear()),
        ),
        sharded_state_dict_keys_map=submodules.sharded_state_dict_keys_map | keys_map,
    )
    return ModuleSpec(module=WITH_BOUND[spec.module], submodules=submodules)
