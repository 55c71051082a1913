"""The launcher's parts: the spec on the command line, the flags it registers, the values it sets."""

import argparse

import pytest

from hgrn2_megatron import UsageError, arguments, checkpoint_check, restored_args
from hgrn2_megatron.__main__ import check_spec

FULL = ["hgrn2_megatron.spec", "hgrn2"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--spec", "hgrn2"],
        ["--spec", "hgrn2", "--lr", "1"],
        ["--spec=hgrn2", "--lr", "1"],
        ["--lr", "1", "--spec", *FULL],
    ],
)
def test_every_way_to_write_the_spec(argv):
    spec = arguments.spec_of(argv)
    assert arguments.full_spec(spec) == FULL
    assert arguments.is_hgrn2_spec(spec) and not arguments.is_stack_spec(spec)


def test_the_spec_of_a_hybrid_model_has_a_short_form_too():
    stack = [FULL[0], "hgrn2_stack"]
    for given in (["hgrn2_stack"], stack):
        assert arguments.full_spec(given) == stack and arguments.is_stack_spec(given)


def test_a_command_without_a_spec_has_none():
    assert arguments.spec_of(["--lr", "1"]) is None
    check_spec(None)


def test_specs_of_others_pass_if_they_can_be_imported():
    stock = ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]
    assert arguments.full_spec(stock) == stock
    check_spec(stock)
    check_spec(["local"])
    with pytest.raises(UsageError, match="--spec no_such_module thing"):
        check_spec(["no_such_module", "thing"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], "0 words"),
        ([*FULL, "more"], "3 words"),
        (["hgrn2", "more"], "--spec hgrn2 takes no second word: drop more"),
    ],
)
def test_a_spec_with_another_number_of_words(spec, message):
    with pytest.raises(UsageError, match=message):
        check_spec(spec)


def test_flags_are_typed_and_every_config_field_has_one():
    parser = arguments.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args("--hgrn2-expand-ratio 64 --hgrn2-norm-eps 1e-6 --hgrn2-loss-chunk-size 8192".split())
    assert (args.hgrn2_expand_ratio, args.hgrn2_norm_eps, args.hgrn2_loss_chunk_size) == (64, 1e-6, 8192)
    fields = {f for f in arguments.HGRN2TransformerConfig.__dataclass_fields__ if f.startswith("hgrn2_")}
    # where there is a command line, Megatron's own flags say it
    fields.remove("hgrn2_packed_layout")
    assert {name for name in vars(args) if name.startswith("hgrn2_")} == fields
    # no part of the model: a run that takes over a checkpoint's has its own
    assert fields - set(restored_args.CHECKPOINT_ARGS) == {"hgrn2_loss_chunk_size"}


@pytest.mark.parametrize(
    ("hidden", "ffn"),
    [(1024, 2816), (2048, 5632)],  # the published 0.4B and 1.3B models
)
def test_silent_values_are_those_of_published_models(hidden, ffn):
    args = argparse.Namespace(
        spec=None, position_embedding_type=None, ffn_hidden_size=None, hidden_size=hidden, hgrn2_layer_pattern="H"
    )
    arguments.fill_silent(args)
    assert (args.ffn_hidden_size, args.position_embedding_type) == (ffn, "none")
    args.position_embedding_type, args.hgrn2_layer_pattern = None, "HHH*"
    arguments.fill_silent(args)
    assert args.position_embedding_type == "rope"
    args.position_embedding_type, args.hgrn2_layer_pattern, args.hybrid_layer_pattern = None, "H", "M-*-"
    arguments.fill_silent(args)
    assert args.position_embedding_type == "rope"


@pytest.mark.parametrize(
    ("here", "saved", "flag"),
    [
        ({}, {"hybrid_layer_pattern": "M-|M-*-"}, None),  # stages are no part of the model
        ({}, {"hybrid_layer_pattern": "M-*-M-"}, "--hybrid-layer-pattern is M-M-[*]- here and M-[*]-M- in"),
        ({"hgrn2_expand_ratio": 64}, {}, "--hgrn2-expand-ratio is 64 here and 128 in"),
        ({}, {"spec": FULL, "num_layers": 3, "hgrn2_layer_pattern": "HH*"}, None),  # the same model as a GPT
        ({}, {"spec": FULL, "num_layers": 3}, "--hybrid-layer-pattern is M-M-[*]- here and M-M-M- in"),
    ],
)
def test_a_hybrid_models_checkpoint_is_of_the_same_model(here, saved, flag):
    model = {"spec": [FULL[0], "hgrn2_stack"], "num_layers": 6, "hybrid_layer_pattern": "M-M-*-"}
    model |= {"num_attention_heads": 4, "group_query_attention": False, "finetune": False, "no_load_optim": False}
    args, checkpoint_args = (argparse.Namespace(**model | changes) for changes in (here, saved))
    if flag is None:
        return checkpoint_check.check_same_model(args, checkpoint_args)
    with pytest.raises(UsageError, match=flag):
        checkpoint_check.check_same_model(args, checkpoint_args)


@pytest.mark.parametrize("there", [True, False])
def test_fusions_are_off_where_their_extension_is_missing(there, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda module: object() if there else None)
    off = {"gradient_accumulation_fusion": False, "masked_softmax_fusion": False}
    assert arguments.silent_defaults() == arguments.SILENT | ({} if there else off)
