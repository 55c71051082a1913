"""Layer specs: HGRN2 or attention, with an MLP or experts, from Transformer Engine's modules or Megatron's own."""

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

from hgrn2_megatron.config import HGRN2Config, has_experts
from hgrn2_megatron.mixer import HGRN2Mixer, HGRN2MixerSubmodules
from hgrn2_megatron.norm import LocalRMSNorm


def transformer_block_submodules(
    config: TransformerConfig, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """Return the layer specs and the final norm of one pipeline stage's TransformerBlock.

    The function starts from the layers that Megatron itself would build: attention with an MLP or experts, according to
    its own flags. It then puts the HGRN2 mixer into the layers that the layer pattern names.

    Args:
        config: Megatron's TransformerConfig, already checked by `requirements.check`.
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


def _use_te(config: TransformerConfig) -> bool:
    return config.transformer_impl == "transformer_engine"


def backend(config: TransformerConfig) -> TESpecProvider | LocalSpecProvider:
    """Return the classes of linear layers, those of Transformer Engine or Megatron's own."""
    return TESpecProvider() if _use_te(config) else LocalSpecProvider()


def final_norm(config: TransformerConfig):
    """Return the class of the norm after the last layer."""
    return TESpecProvider().layer_norm() if _use_te(config) else LocalRMSNorm


def stock_layers(config: TransformerConfig) -> list[ModuleSpec]:
    """Return specs of the attention layers that Megatron would build for all stages, with norms that support SP."""
    use_te = _use_te(config)
    specs = get_gpt_decoder_layer_specs(
        config, use_te, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )
    if use_te:
        return specs
    return [
        _with_norms(spec, bool(config.num_moe_experts) and has_experts(config.moe_layer_freq, layer))
        for layer, spec in enumerate(specs)
    ]


def _with_norms(spec: ModuleSpec, experts: bool) -> ModuleSpec:
    keys_map = dict(spec.submodules.sharded_state_dict_keys_map)
    if experts:
        # Transformer Engine does not fuse the norm into experts, and saves it under the norm's own name.
        keys_map.pop("pre_mlp_layernorm.")
    norms = dict(input_layernorm=LocalRMSNorm, pre_mlp_layernorm=LocalRMSNorm)
    submodules = dataclasses.replace(spec.submodules, **norms, sharded_state_dict_keys_map=keys_map)
    return ModuleSpec(module=spec.module, submodules=submodules)


class _WithBound:
    """Layer that passes its lower bound into its CUDA graph as an input, if Megatron captures each layer by itself.

    The backward of a graph gives gradients only to its inputs and to the layer's own parameters, but the table of
    bounds belongs to the stack. The bound takes the place of attention_bias, which Megatron passes on to the mixer.
    """

    def __call__(self, *args, **kwargs):
        # Generation needs no gradient, so the graph computes the bound itself.
        if self.config.cuda_graph_impl == "local" and kwargs.get("inference_context") is None:
            kwargs["attention_bias"] = self.self_attention.lower_bound()
        return super().__call__(*args, **kwargs)


class HGRN2Layer(_WithBound, TransformerLayer):
    """Megatron's TransformerLayer with an HGRN2 mixer."""


class HGRN2MoELayer(_WithBound, MoETransformerLayer):
    """Megatron's MoETransformerLayer with an HGRN2 mixer."""


WITH_BOUND = {TransformerLayer: HGRN2Layer, MoETransformerLayer: HGRN2MoELayer}


def with_mixer(spec: ModuleSpec, config: TransformerConfig) -> ModuleSpec:
    """Return the spec of the same layer with the HGRN2 mixer in the place of self-attention."""
    use_te, submodules, classes = _use_te(config), spec.submodules, backend(config)
    # Transformer Engine fuses the input norm into in_proj. A separate norm is saved under the name of the fused one, as
    # Megatron does for attention, so that each implementation can load the other's checkpoints.
    in_proj = classes.column_parallel_layer_norm_linear() if use_te else classes.column_parallel_linear()
    keys_map = {} if use_te else {"input_layernorm.": "self_attention.in_proj.layer_norm_"}
    submodules = dataclasses.replace(
        submodules,
        self_attention=ModuleSpec(
            module=HGRN2Mixer,
            submodules=HGRN2MixerSubmodules(in_proj=in_proj, out_proj=classes.row_parallel_linear()),
        ),
        sharded_state_dict_keys_map=submodules.sharded_state_dict_keys_map | keys_map,
    )
    return ModuleSpec(module=WITH_BOUND[spec.module], submodules=submodules)
