"""Megatron's args of small models, as the checks of checkpoints compare them."""

import argparse

from hgrn2_megatron import arguments, checkpoint_flags


def args_of(spec=(arguments.MODULE, arguments.GPT), **changes) -> argparse.Namespace:
    """Return Megatron's args of a model of four layers."""
    tables = (checkpoint_flags.BLOCK_FLAGS, checkpoint_flags.ATTENTION_FLAGS, checkpoint_flags.LATENT_FLAGS)
    names = {name for table in tables for name in table.values()}
    values = dict.fromkeys(names) | dict(
        spec=spec and list(spec),
        num_layers=4,
        num_experts=None,
        moe_layer_freq=1,
        hybrid_layer_pattern=None,
        mtp_num_layers=None,
        expert_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        num_layers_per_virtual_pipeline_stage=None,
        num_attention_heads=4,
        hgrn2_layer_pattern="HH*H",
        hgrn2_expand_ratio=32,
        hgrn2_lower_bounds="learned",
        group_query_attention=False,
        position_embedding_type="rope",
        transformer_impl="local",
        finetune=True,
        use_checkpoint_args=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        no_load_optim=False,
    )
    return argparse.Namespace(**values | changes)


def stack_of(pattern: str, **changes) -> argparse.Namespace:
    """The same of a HybridModel with HGRN2 layers."""
    spec = (arguments.MODULE, arguments.STACK)
    return args_of(spec, hybrid_layer_pattern=pattern, hgrn2_layer_pattern="H", num_layers=len(pattern), **changes)


def attention_stack_of(pattern: str, **changes) -> argparse.Namespace:
    """The same of a HybridModel of Megatron's own layers."""
    return args_of(("their.module", "stack"), hybrid_layer_pattern=pattern, num_layers=len(pattern), **changes)


EXPERTS = dict(num_experts=4)
