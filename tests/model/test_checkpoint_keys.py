"""Both implementations save a model under the same names.

Transformer Engine is not needed: stand-ins have the parameters of its modules, and everything else is the real spec.
"""

import argparse

import harness
import pytest
import torch

HYBRID = {"hgrn2_layer_pattern": "H*H"}
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


def entries(model) -> list:
    """Every sharded tensor of a model's checkpoint."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state_dict = model.sharded_state_dict()
    apply_factories(state_dict)
    return [entry for entry in nested_values(state_dict) if isinstance(entry, ShardedTensor)]


def saved(**config) -> dict[str, tuple]:
    """Name -> (shape, dtype) of every tensor of a model's checkpoint."""
    harness.start_megatron()
    model = harness.build_model(**HYBRID, **config)
    return {entry.key: (tuple(entry.global_shape), entry.dtype) for entry in entries(model)}


@pytest.mark.parametrize("channel_mixer", [{}, EXPERTS, EXPERTS | {"moe_layer_freq": [0, 1, 1]}])
def test_both_implementations_save_the_same_names(channel_mixer, transformer_engine):
    local = saved(**channel_mixer)
    assert saved(**channel_mixer, **transformer_engine) == local
    assert "decoder.layers.0.self_attention.in_proj.layer_norm_weight" in local


def run_args(implementation: str) -> argparse.Namespace:
    from hgrn2_megatron import arguments

    return argparse.Namespace(spec=[arguments.MODULE, arguments.GPT], transformer_impl=implementation)


@pytest.mark.parametrize("saving", ["local", "transformer_engine"])
def test_each_implementation_loads_the_others_checkpoint(saving, transformer_engine, tmp_path, monkeypatch):
    from megatron.core import dist_checkpointing

    from hgrn2_megatron import checkpoint

    harness.start_megatron()
    # Megatron waits for copies from a GPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    implementations = {"local": {}, "transformer_engine": transformer_engine}
    (loading,) = implementations.keys() - {saving}
    models = {name: harness.build_model(**HYBRID, **settings) for name, settings in implementations.items()}
    with torch.no_grad():
        for p in models[saving].parameters():
            p.normal_()

    dist_checkpointing.save(models[saving].sharded_state_dict(), str(tmp_path))
    wanted = {"model": models[loading].sharded_state_dict()}
    checkpoint.adapt(run_args(loading), wanted, run_args(saving), str(tmp_path))
    models[loading].load_state_dict(dist_checkpointing.load(wanted, str(tmp_path))["model"], strict=True)

    expected = {(entry.key, entry.global_offset): entry.data for entry in entries(models[saving])}
    loaded = {(entry.key, entry.global_offset): entry.data for entry in entries(models[loading])}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())
