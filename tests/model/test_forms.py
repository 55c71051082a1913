"""A HybridModel and the GPT that computes the same function: patterns and names."""

import pytest

from hgrn2_megatron import UsageError, forms


@pytest.mark.parametrize(
    ("pattern", "layers", "experts"),
    [
        ("M-", "H", [False]),
        ("M-|*EM-", "H*H", [False, True, False]),
        ("ME*-/*-/*-", "H*", [True, False]),
    ],
)
def test_pattern_of_the_gpt(pattern, layers, experts):
    assert forms.gpt_pattern(pattern) == (layers, experts)
    assert forms.stack_pattern(layers, experts) == pattern.split("/")[0].replace("|", "")


@pytest.mark.parametrize("pattern", ["M", "MM-", "M-*", "-M-M", "M--", "G-M-"])
def test_layers_that_are_no_pairs_have_no_gpt(pattern):
    with pytest.raises(UsageError, match="has no counterpart among GPTs"):
        forms.gpt_pattern(pattern)


@pytest.mark.parametrize(
    ("gpt", "stack"),
    [
        ("decoder.layers.3.self_attention.in_proj.weight", "decoder.layers.6.self_attention.in_proj.weight"),
        ("decoder.layers.3.input_layernorm.weight", "decoder.layers.6.input_layernorm.weight"),
        ("decoder.layers.3.mlp.linear_fc1._extra_state", "decoder.layers.7.mlp.linear_fc1._extra_state"),
        ("decoder.layers.10.pre_mlp_layernorm.weight", "decoder.layers.21.pre_mlp_layernorm.weight"),
        ("decoder.final_layernorm.weight", "decoder.final_norm.weight"),
        ("decoder.hgrn2_bounds.weight", "decoder.hgrn2_bounds.weight"),
        (
            "optimizer.state.exp_avg.decoder.layers.0.mlp.linear_fc2.weight",
            "optimizer.state.exp_avg.decoder.layers.1.mlp.linear_fc2.weight",
        ),
    ],
)
def test_names_of_both_forms(gpt, stack):
    assert forms.stack_name(gpt) == stack
    assert forms.gpt_name(stack) == gpt
