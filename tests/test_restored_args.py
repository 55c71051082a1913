"""Args that --use-checkpoint-args takes from a checkpoint, also from one of the other form of the model."""

import argparse
import sys

import pytest
from checkpoint_settings import EXPERTS, args_of, attention_stack_of, stack_of

from hgrn2_megatron import arguments, restored_args


def restored(here: argparse.Namespace, saved: argparse.Namespace, **copied) -> argparse.Namespace:
    """Args after --use-checkpoint-args. `copied` has what Megatron copies from the checkpoint before."""
    args = argparse.Namespace(**vars(here) | copied)
    restored_args.restore(args, here, saved)
    return args


def test_checkpoint_args_of_another_model():
    ours = args_of(layernorm_epsilon=1e-6)
    # every run through the launcher saves the plugin's flags
    args = restored(ours, args_of(spec=None, hgrn2_layer_pattern="H", layernorm_epsilon=1e-5))
    assert (args.hgrn2_layer_pattern, args.layernorm_epsilon) == ("HH*H", 1e-5)
    assert restored(ours, args_of(hgrn2_layer_pattern="H")).hgrn2_layer_pattern == "H"
    saved = dict(
        hgrn2_expand_ratio=64,
        hgrn2_layer_pattern="HHHH",
        hgrn2_lower_bounds="none",
        hgrn2_norm_eps=1e-3,
        layernorm_epsilon=1e-4,
    )
    args = restored(ours, args_of(**saved))
    assert {name: getattr(args, name) for name in saved} == saved
    theirs = attention_stack_of("*-*-*-*-", hidden_dropout=0.1, attention_dropout=0.2)
    # Megatron has copied these
    copied = dict(hidden_dropout=0.1, attention_dropout=0.2)
    args = restored(ours, theirs, spec=theirs.spec, hybrid_layer_pattern="*-*-*-*-", num_layers=8, **copied)
    assert (args.hidden_dropout, args.attention_dropout) == (0.0, 0.0)
    assert (args.spec, args.hybrid_layer_pattern, args.num_layers) == (ours.spec, None, 4)
    assert restored(ours, args_of(**copied), **copied).hidden_dropout == 0.1


def test_checkpoint_args_of_the_other_form():
    stack = stack_of("MEM-|*-M-/*-/*-", hgrn2_expand_ratio=16, **EXPERTS)
    ours = args_of(num_layers=None, hgrn2_layer_pattern="H")
    args = restored(ours, stack, num_layers=8, hybrid_layer_pattern=stack.hybrid_layer_pattern, mtp_num_layers=2)
    assert (args.hybrid_layer_pattern, args.mtp_num_layers) == (None, None)
    assert (args.num_layers, args.hgrn2_layer_pattern, args.moe_layer_freq) == (4, "HH*H", [1, 0, 0, 0])
    assert args.hgrn2_expand_ratio == 16
    # another depth, with which Megatron must build the model before the check refuses it
    ours.num_layers = 2
    assert restored(ours, stack, num_layers=2).moe_layer_freq == 1

    gpt = args_of(moe_layer_freq=[1, 0, 0, 0], **EXPERTS)
    ours = args_of((arguments.MODULE, arguments.STACK), num_layers=None, hgrn2_layer_pattern="H")
    args = restored(ours, gpt, num_layers=4, moe_layer_freq=[1, 0, 0, 0])
    assert (args.hybrid_layer_pattern, args.hgrn2_layer_pattern) == ("MEM-*-M-", "H")
    assert (args.num_layers, args.moe_layer_freq) == (None, 1)
    ours.hybrid_layer_pattern = "MEM-|*-M-"
    ours.pipeline_model_parallel_size = 2
    assert restored(ours, gpt, num_layers=4).hybrid_layer_pattern == "MEM-|*-M-"


def test_multi_latent_attention_comes_from_the_checkpoint():
    saved = stack_of("M-+-", kv_lora_rank=16, rope_type="rope", qk_layernorm=True)
    args = restored(stack_of("M-+-"), saved, hybrid_layer_pattern="M-+-")
    assert (args.kv_lora_rank, args.rope_type, args.qk_layernorm) == (16, "rope", True)
    # a model without it keeps the flags of the command line
    assert restored(stack_of("M-*-"), stack_of("M-*-", kv_lora_rank=16)).kv_lora_rank is None


def test_a_hybrid_model_does_not_take_the_virtual_stages_of_a_gpt():
    ours = args_of((arguments.MODULE, arguments.STACK), num_layers=None, hgrn2_layer_pattern="H")
    # --use-mp-args-from-checkpoint-args copies it
    args = restored(ours, args_of(), num_layers=4, num_layers_per_virtual_pipeline_stage=1)
    assert args.num_layers_per_virtual_pipeline_stage is None


@pytest.mark.parametrize(
    ("script", "form"), [("pretrain_gpt.py", "hgrn2"), ("a/pretrain_hybrid.py", "hgrn2_stack"), ("serve.py", None)]
)
def test_without_a_spec_the_script_names_the_form(script, form, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script])
    ours = args_of(spec=None, num_layers=None)
    for saved in (args_of(), stack_of("M-M-*-M-")):
        copied = dict(spec=saved.spec, num_layers=saved.num_layers, hybrid_layer_pattern=saved.hybrid_layer_pattern)
        args = restored(ours, saved, **copied)
        assert args.spec == ([arguments.MODULE, form] if form else saved.spec)
