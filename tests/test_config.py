"""HGRN2Config: the values that it refuses, and the layers that it reads from a pattern."""

import math

import pytest
from model_settings import stack_settings

from hgrn2_megatron import HGRN2Config


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("expand_ratio", 0, "--hgrn2-expand-ratio"),
        ("layer_pattern", "HXH", "--hgrn2-layer-pattern"),
        ("layer_pattern", "**", "--hgrn2-layer-pattern"),
        ("layer_pattern", "", "--hgrn2-layer-pattern"),
        ("layer_pattern", "H ", "the unknown letters ' '"),
        ("lower_bounds", "fixed", "--hgrn2-lower-bounds"),
        ("norm_eps", 0.0, "--hgrn2-norm-eps"),
        ("norm_eps", math.inf, "--hgrn2-norm-eps"),
        ("norm_eps", math.nan, "--hgrn2-norm-eps"),
    ],
)
def test_nonsense_is_refused_by_flag(field, value, flag):
    with pytest.raises(ValueError, match=flag):
        HGRN2Config(**{field: value})


def test_pattern_repeats_over_the_whole_depth():
    hgrn2 = HGRN2Config(layer_pattern="HHH*")
    assert [hgrn2.is_hgrn2_layer(i) for i in range(8)] == [True, True, True, False] * 2
    assert hgrn2.num_hgrn2_layers(6) == 5


def test_heads_need_a_multiple_of_the_expand_ratio():
    assert HGRN2Config(expand_ratio=32).num_heads(96) == 3
    with pytest.raises(ValueError, match="--hidden-size 100"):
        HGRN2Config(expand_ratio=32).num_heads(100)


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [("M-M-M-", "HHH"), ("M-*-|M-", "H*H"), ("MM--*", "HH*"), ("|M-", "H"), ("M-*-/M-/M-", "H*"), ("M-+-GE", "H+G")],
)
def test_blocks_of_a_hybrid_model_are_its_token_mixers(pattern, blocks):
    assert HGRN2Config.of_stack(stack_settings(hybrid_layer_pattern=pattern)).layer_pattern == blocks
