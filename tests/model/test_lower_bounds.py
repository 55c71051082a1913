"""The holder of the lower bounds: values, precision, checkpoint entry."""

import harness
import pytest
import torch


def make_bounds(pp_group=None, first=True):
    from megatron.core.transformer import TransformerConfig

    from hgrn2_megatron.lower_bounds import LowerBounds

    harness.start_megatron()
    config = TransformerConfig(num_layers=4, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True)
    return LowerBounds(4, 2, 16, config, harness.Group(), pp_group or harness.Group(), first)


@pytest.fixture
def bounds():
    return make_bounds()


def test_bounds_at_initialisation_are_layer_over_depth(bounds):
    for layer in range(4):
        torch.testing.assert_close(bounds(layer), torch.full((2, 16), layer / 4))
    assert bounds(0).abs().max() == 0


def test_bounds_rise_with_depth_and_stay_below_one(bounds):
    torch.nn.init.normal_(bounds.weight, std=3.0)
    table = torch.stack([bounds(layer) for layer in range(4)])
    assert (table[1:] > table[:-1]).all() and table.max() < 1


def test_every_bound_but_the_first_reaches_every_row(bounds):
    torch.nn.init.normal_(bounds.weight)
    bounds(0).sum().backward()
    assert bounds.weight.grad.norm() == 0
    bounds(2).square().sum().backward()
    assert (bounds.weight.grad.view(4, -1) != 0).all()


def test_bounds_of_a_bf16_model_are_fp32(bounds):
    torch.nn.init.normal_(bounds.bfloat16().weight)
    bound = bounds(2)
    assert bounds.weight.dtype == torch.bfloat16 and bound.dtype == torch.float32
    table = bounds.weight.float().view(4, -1).softmax(0)
    torch.testing.assert_close(bound.flatten(), table[1] + table[2], rtol=1e-6, atol=0)


def test_a_model_in_fp64_has_bounds_in_fp64():
    harness.start_megatron()
    model = harness.build_model(params_dtype=torch.float64).double()
    tokens, positions = harness.batch()
    logits = model(tokens, positions, None)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits, model.float()(tokens, positions, None).double(), rtol=1e-4, atol=1e-4)


def test_checkpoint_entry_says_depth_and_width_and_hands_out_the_parameter_itself(bounds):
    (factory,) = bounds.sharded_state_dict("decoder.hgrn2_bounds.").values()
    assert factory.data is bounds.weight
    (entry,) = factory.build()
    assert entry.key == "decoder.hgrn2_bounds.weight" and entry.global_shape == (4, 32)
    assert torch.equal(factory.merge_fn([entry.data]), bounds.weight)


@pytest.mark.parametrize(("rank", "first", "replica"), [(0, True, 0), (0, False, 1), (1, False, 2)])
def test_one_of_the_replicas_is_counted_in_the_gradients_norm_and_saved(rank, first, replica):
    from megatron.core.transformer.module import param_is_not_shared

    bounds = make_bounds(harness.Group(rank, 2), first)
    assert param_is_not_shared(bounds.weight) == (replica == 0)
    (factory,) = bounds.sharded_state_dict("decoder.hgrn2_bounds.").values()
    assert [entry.replica_id[0] for entry in factory.build()] == [replica]
