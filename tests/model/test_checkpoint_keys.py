"""Both implementations save a model under the same names.

Transformer Engine is not needed: stand-ins have the parameters of its modules, and everything else is the real spec.
"""

import harness
import pytest
import torch

EXPERTS = {"num_moe_experts": 2, "moe_token_dispatcher_type": "allgather"}


def stand_ins():
    """Megatron's provider of modules, with modules that fuse norms as those of Transformer Engine do."""
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from hgrn2_megatron.norm import LocalRMSNorm

    class Norm(torch.nn.RMSNorm):
        """A norm with extra state."""

        def __init__(self, config, hidden_size, eps, **ignored):
            super().__init__(hidden_size, eps)

        def get_extra_state(self):
            return torch.empty(0, dtype=torch.uint8)

        def set_extra_state(self, state): ...

    class LayerNormLinear(ColumnParallelLinear):
        """A linear with the norm before it."""

        def __init__(self, input_size, output_size, *, config, **kwargs):
            super().__init__(input_size, output_size, config=config, **kwargs)
            norm = LocalRMSNorm(config, input_size, config.layernorm_epsilon)
            self.layer_norm_weight = norm.weight

    class Provider(LocalSpecProvider):
        def fuse_layernorm_and_linear(self):
            return True

        def column_parallel_layer_norm_linear(self):
            return LayerNormLinear

        def layer_norm(self, *args, **kwargs):
            return Norm

    return Provider


@pytest.fixture
def transformer_engine(monkeypatch):
    """Settings of a model with the stand-ins."""
    import megatron.core.extensions.transformer_engine as extension
    from megatron.core.models.gpt import gpt_layer_specs

    from hgrn2_megatron import layer

    provider = stand_ins()
    for module in (gpt_layer_specs, layer):
        monkeypatch.setattr(module, "TESpecProvider", provider)
    monkeypatch.setattr(extension, "HAVE_TE", True)
    return {"transformer_impl": "transformer_engine"}


def saved(**config) -> dict[str, tuple]:
    """Name -> (shape, dtype) of every tensor of a model's checkpoint, and its extra states."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    harness.start_megatron()
    state_dict = harness.build_model(hgrn2_layer_pattern="H*H", **config).sharded_state_dict()
    apply_factories(state_dict)
    tensors = [entry for entry in nested_values(state_dict) if isinstance(entry, ShardedTensor)]
    return {entry.key: (tuple(entry.global_shape), entry.dtype) for entry in tensors}


@pytest.mark.parametrize("channel_mixer", [{}, EXPERTS, EXPERTS | {"moe_layer_freq": [0, 1, 1]}])
def test_both_implementations_save_the_same_names(channel_mixer, transformer_engine):
    local = saved(**channel_mixer)
    assert saved(**channel_mixer, **transformer_engine) == local
    assert "decoder.layers.0.self_attention.in_proj.layer_norm_weight" in local
