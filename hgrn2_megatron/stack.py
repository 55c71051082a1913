"""HGRN2Stack, the layers of Megatron's HybridModel with HGRN2 in the place of Mamba (symbol M)."""

import copy

from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from hgrn2_megatron import cuda_graphs, offloading, other_mixers, requirements
from hgrn2_megatron.block import banner, create_bounds, share_bounds
from hgrn2_megatron.config import PIPE, STACK_MIXERS, HGRN2Config, UsageError, split_heads
from hgrn2_megatron.layer import final_norm, stock_layers, with_mixer
from hgrn2_megatron.settings import Settings, global_args

# value of --moe-router-load-balancing-type -> the name under which Megatron's router logs the loss
EXPERT_LOSSES = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}


class HGRN2Stack(HybridStack):
    """One pipeline chunk of a HybridModel: HGRN2 at M, attention at *, an MLP at -, experts at E.

    Each layer is one half of a GPT's layer, so "M-M-*-" computes the same function as a GPT with the pattern "HH*".
    The table of lower bounds has one row for each token mixer of the main part of the whole pattern. Beside M and *
    these are + for multi-latent attention and G for a gated delta net, which a GPT cannot have. The heads of
    multi-token prediction behind the main part are in mtp.py.

    Args:
        config: Megatron's TransformerConfig, with `hgrn2_*` fields if the launcher built it. The whole pattern comes
            from its attribute `hybrid_layer_pattern` or from Megatron's command line.
        submodules: ignored, because the layers depend on the config. Megatron passes it if the spec has it.
        layer_type_list: symbols of this chunk.
        pp_layer_offset: number of symbols before this chunk.
        pre_process: whether this is the model's first chunk.
        post_layer_norm: whether the last chunk ends with a norm.
        pg_collection: process groups.
        rest: further arguments of HybridStack.

    Raises:
        UsageError: a flag or the pattern cannot train HGRN2. The message names the flag to change.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules | None = None,
        *,
        layer_type_list: list[str],
        pg_collection: ProcessGroupCollection,
        pp_layer_offset: int = 0,
        pre_process: bool = True,
        post_layer_norm: bool = True,
        **rest,
    ):
        settings = Settings(config, global_args())
        warnings = requirements.check(settings, stack=True)
        own = "".join(layer_type_list)
        pattern, heads = split_heads(settings.hybrid_layer_pattern)
        _check_chunk(pattern, own, pp_layer_offset, config, pg_collection.pp)
        if len(heads) != (config.mtp_num_layers or 0):
            raise UsageError(
                f"mtp_num_layers of the config is {config.mtp_num_layers}, but the hybrid layer pattern has "
                f"{len(heads)} heads of multi-token prediction: set mtp_num_layers to this number"
            )
        cuda_graphs.settle(config)
        hgrn2 = HGRN2Config.of_stack(settings)
        num_mixers = len(hgrn2.layer_pattern)

        # Megatron's own final norm needs Transformer Engine, so the norm is added below.
        super().__init__(
            config,
            submodules=stack_submodules(config),
            layer_type_list=layer_type_list,
            pg_collection=pg_collection,
            pp_layer_offset=pp_layer_offset,
            pre_process=pre_process,
            post_layer_norm=False,
            **rest,
        )
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config)(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
        self.hgrn2_bounds = create_bounds(self, hgrn2, num_mixers)
        share_bounds(self, _rows(pattern.replace(PIPE, ""), pp_layer_offset, len(own)))
        offloading.check_layers(self)
        _make_room_for_expert_losses(config)
        if pre_process:
            banner(config, hgrn2, num_mixers, warnings, heads)


def _make_room_for_expert_losses(config: TransformerConfig):
    """Make every stage log the losses of experts with one value per layer.

    Stages with experts do this by themselves, and add one value for each head of multi-token prediction. On a stage
    without experts, Megatron before 0.20 logs one value for each E of the pattern. The sum over stages then waits
    forever.
    """
    if not config.num_moe_experts:
        return
    kinds = config.moe_router_load_balancing_type
    names = [EXPERT_LOSSES[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind in EXPERT_LOSSES]
    for name in (*names, "z_loss"):
        get_moe_metrics_tracker().ensure_initialized(name, config.num_layers + (config.mtp_num_layers or 0))


def _rows(symbols: str, start: int, length: int) -> list[int]:
    """Return the number of token mixers before each of `length` layers, the first of which is layer `start`."""
    return [sum(symbol in STACK_MIXERS for symbol in symbols[:layer]) for layer in range(start, start + length)]


def _check_chunk(pattern: str, own: str, start: int, config: TransformerConfig, pp_group):
    """Check that `pattern` is the main part of what Megatron builds. The lower bounds need the whole depth."""
    segments, num_stages = pattern.split(PIPE), pp_group.size()
    chunks = num_stages * (config.virtual_pipeline_model_parallel_size or 1) if num_stages > 1 else 1
    if len(segments) not in (1, chunks):
        raise UsageError(
            f"--hybrid-layer-pattern {pattern!r} has {len(segments)} segments for {chunks} pipeline chunks: "
            "write one segment per chunk, and no | for a single stage"
        )
    # Megatron divides a pattern without | among the stages by itself.
    known = own in segments[pp_group.rank() :: num_stages] if len(segments) == chunks else bool(own)
    if not known or not pattern.replace(PIPE, "").startswith(own, start):
        raise UsageError(
            f"HybridModel builds the layers {own!r} from layer {start} on, but --hybrid-layer-pattern is {pattern!r}: "
            "give the model and the flag the same pattern"
        )


def stack_submodules(config: TransformerConfig) -> HybridStackSubmodules:
    """Return the layer spec of each symbol. Each is one half of the layer that a GPT with the same flags has.

    Args:
        config: Megatron's TransformerConfig, already checked by `requirements.check`.
    """
    pair = copy.copy(config)
    pair.num_layers, pair.moe_layer_freq, pair.multi_latent_attention = 2, [0, 1], False
    dense, experts = stock_layers(pair)
    others = {name: _mixer_half(spec) for name, spec in other_mixers.layers(config, dense).items()}
    return HybridStackSubmodules(
        # Megatron itself passes add_layer_offset=False to all other layers, because their numbers already count earlier
        # stages. It does not pass the argument to Mamba layers.
        mamba_layer=_mixer_half(with_mixer(dense, config), add_layer_offset=False),
        attention_layer=_mixer_half(dense),
        mlp_layer=_channel_half(dense),
        moe_layer=_channel_half(experts),
        **others,
    )


def _mixer_half(spec: ModuleSpec, **params) -> ModuleSpec:
    return _part(spec, params, "input_layernorm", "self_attention", "self_attn_bda")


def _channel_half(spec: ModuleSpec) -> ModuleSpec:
    return _part(spec, {}, "pre_mlp_layernorm", "mlp", "mlp_bda")


def _part(spec: ModuleSpec, params: dict, *names: str) -> ModuleSpec:
    """Return the spec of a layer that has only the named submodules of another."""
    names = (*names, "sharded_state_dict_keys_map")
    submodules = TransformerLayerSubmodules(**{name: getattr(spec.submodules, name) for name in names})
    return ModuleSpec(module=spec.module, params=params, submodules=submodules)
