"""The settings of a model on both sides: the defaults of fla, and what one side cannot express."""

import argparse

import pytest
from conversion_cases import ATTENTION, CONFIG, assert_refused, change, convert, hf_weights, write_hf

from hgrn2_megatron.conversion.config import megatron_args


def test_what_a_config_leaves_out_is_as_in_fla():
    args = megatron_args({"model_type": "hgrn2"})
    assert (args.hybrid_layer_pattern, args.hidden_size, args.ffn_hidden_size) == (24 * "M-", 2048, 5632)
    assert (args.vocab_size, args.padded_vocab_size, args.hgrn2_expand_ratio) == (32000, 32000, 128)
    assert args.untie_embeddings_and_output_weights and args.hgrn2_lower_bounds == "learned"
    assert megatron_args({"model_type": "hgrn2", "hidden_ratio": 3}).ffn_hidden_size == 4096
    hybrid = megatron_args({"model_type": "hgrn2", "attn": {"layers": [1], "num_heads": 16}})
    assert (hybrid.position_embedding_type, hybrid.rotary_base) == ("rope", 10000)
    named = {"layers": [2], "num_heads": 16, "num_kv_heads": 16, "qkv_bias": False, "rope_theta": 10000.0}
    two = megatron_args({"model_type": "hgrn2", "attn": [{"layers": [1], "num_heads": 16}, named]})
    assert two.hybrid_layer_pattern == "M-*-*-" + 21 * "M-" and two.rotary_base == 10000


REFUSED = [
    ({"use_short_conv": True}, "use_short_conv"),
    ({"attnres_block_size": 2}, "attnres_block_size"),
    ({"hidden_act": "powlu"}, "hidden_act"),
    ({"elementwise_affine": False}, "elementwise_affine"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"expand_ratio": None, "num_heads": 3}, "num_heads"),
    ({"expand_ratio": 48}, "--hgrn2-expand-ratio 48"),
    ({"attn": ATTENTION | {"window_size": 32}}, "attn window_size"),
    ({"attn": ATTENTION | {"qk_norm": True}}, "attn qk_norm"),
    ({"attn": ATTENTION | {"qkv_bias": True}}, "attn qkv_bias"),
    ({"attn": ATTENTION | {"num_heads": 5}}, "attn num_heads"),
    ({"attn": [ATTENTION, ATTENTION | {"layers": [2], "rope_theta": 1e4}]}, "attn rope_theta"),
    ({"attn": [ATTENTION, {"layers": [2], "num_heads": 4, "num_kv_heads": 2}]}, "attn rope_theta is 10000"),
    ({"attn": [ATTENTION, {"layers": [2], "num_heads": 4, "rope_theta": 5e3}]}, "attn num_kv_heads is 4"),
    (
        {"attn": [{"layers": [1], "num_heads": 4}, {"layers": [2], "num_heads": 4, "rope_theta": None}]},
        "is None: it is",
    ),
    ({"attn": ATTENTION | {"layers": [3]}}, "must name its layers, each below 3"),
    ({"model_type": "gla"}, "model_type"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_config_of_another_model_is_refused_by_name(changes, message, tmp_path):
    source = write_hf(tmp_path / "hf", hf_weights(CONFIG), **changes)
    assert_refused(message, source, tmp_path / "out")


def test_flags_that_only_fuse_are_taken(tmp_path):
    fused = {"fuse_norm": False, "fuse_swiglu": False, "fuse_cross_entropy": False, "attn_mode": "fused_recurrent"}
    convert(write_hf(tmp_path / "hf", **fused), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hgrn2_norm_eps": 1e-6}, "--hgrn2-norm-eps"),
        ({"spec": None}, "--spec none"),
        ({"hybrid_layer_pattern": "M*-M--"}, r"--hybrid-layer-pattern 'M\*-M--' has no counterpart"),
        ({"mtp_num_layers": 1, "hybrid_layer_pattern": "M-*-M-/M-"}, "--mtp-num-layers is 1 .* Give --drop-mtp-heads"),
        ({"num_experts": 4, "hybrid_layer_pattern": "M-*-ME"}, "--num-experts"),
        ({"qk_layernorm": True}, "--qk-layernorm"),
        ({"add_qkv_bias": True}, "--add-qkv-bias"),
        ({"glu_linear_offset": 1.0}, "--glu-linear-offset"),
        ({"activation_func_clamp_value": 0.5}, "--activation-func-clamp-value"),
        ({"window_size": (64, 0)}, "--window-size"),
        ({"kv_channels": 32}, "--kv-channels"),
        ({"rotary_percent": 0.5}, "--rotary-percent"),
        ({"position_embedding_type": "yarn"}, "--position-embedding-type is yarn .* must be rope or none"),
        ({"hybrid_layer_pattern": "M-*-M-|M-"}, r"decoder.layers.6\S* is missing"),
        ({"hybrid_layer_pattern": "M-*-"}, r"decoder.layers.4\S* has no place"),
        ({"ffn_hidden_size": 32}, r"decoder.layers.1.mlp.linear_fc1.weight has shape \(192, 64\)"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_model_is_refused_by_name(changes, message, checkpoint, tmp_path):
    def changed(tensors, args):
        return tensors, argparse.Namespace(**vars(args) | changes)

    assert_refused(message, change(checkpoint, tmp_path / "changed", changed), tmp_path / "out")
