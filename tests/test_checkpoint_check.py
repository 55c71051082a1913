"""Checks of a checkpoint's arguments against those of the run that loads it, without a run."""

import argparse

import harness
import pytest
import torch
from checkpoint_settings import EXPERTS, args_of, attention_stack_of, stack_of

from hgrn2_megatron import UsageError, arguments, checkpoint_check


@pytest.mark.parametrize(("here", "saved", "warns"), [(512, 512, False), (384, 512, True), (512, None, False)])
def test_another_padding_of_the_vocabulary_is_named(here, saved, warns):
    args, checkpoint_args = (args_of(padded_vocab_size=size, tensor_model_parallel_size=2) for size in (here, saved))
    warning = checkpoint_check.other_vocabulary(args, checkpoint_args)
    assert bool(warning) == warns
    assert not warns or "384 rows with its padding here and 512 in the checkpoint" in warning
    assert not warns or warning.endswith("--make-vocab-size-divisible-by 256")


@pytest.mark.parametrize(("saved", "vocab_size"), [(257, 257), (384, 500)])
def test_rows_that_cannot_be_kept_get_no_advice(saved, vocab_size):
    args = args_of(padded_vocab_size=512, tensor_model_parallel_size=2, vocab_size=vocab_size)
    assert checkpoint_check.other_vocabulary(args, args_of(padded_vocab_size=saved)).endswith("to ignore them")


@pytest.mark.parametrize(("here", "saved"), [(1, 2), (4, 1)])
def test_only_weights_move_between_runs_with_and_without_expert_parallelism(here, saved):
    def check(here, saved, **changes):
        sizes = (dict(expert_model_parallel_size=size) for size in (here, saved))
        args, checkpoint_args = (args_of(**EXPERTS | size | {"finetune": False} | changes) for size in sizes)
        checkpoint_check.check(args, checkpoint_args, True)

    with pytest.raises(UsageError, match=f"size is {here} here and {saved} .* or give --no-load-optim"):
        check(here, saved)
    check(here, saved, no_load_optim=True)
    check(here, saved, num_experts=None)
    check(2, 4)
    # the args of a converted checkpoint do not have it
    converted = args_of(**EXPERTS, finetune=False)
    del converted.expert_model_parallel_size
    checkpoint_check.check(args_of(**EXPERTS, finetune=False), converted, True, release=True)


def test_both_forms_of_a_model_load_each_others_checkpoints():
    for gpt, stack in (
        (args_of(), stack_of("M-M-*-M-")),
        (args_of(hgrn2_layer_pattern="H", **EXPERTS), stack_of("MEME|MEME", **EXPERTS)),
        (args_of(moe_layer_freq=2, **EXPERTS), stack_of("MEM-*EM-", **EXPERTS)),
    ):
        for here, saved in ((gpt, stack), (stack, gpt)):
            here.finetune = False
            for optimizer in (None, "fully_reshardable", "fully_sharded_model_space"):
                checkpoint_check.check(here, saved, True, optimizer)


@pytest.mark.parametrize(
    ("here", "saved", "message"),
    [
        (args_of(), stack_of("M-*-"), "--num-layers is 4 here and 2 in the checkpoint"),
        (args_of(), stack_of("M-M-M-*-"), "--hgrn2-layer-pattern is HH[*]H here and HHH[*] in"),
        (args_of(), stack_of("M-M-*-ME", **EXPERTS), "--num-experts is None here and 4 in"),
        (args_of(**EXPERTS), stack_of("M-ME*-ME", **EXPERTS), r"--moe-layer-freq is \[1, 1, 1, 1\] here and"),
        (args_of(), stack_of("MM-*"), "a GPT cannot load the checkpoint: .*'MM-[*]' has no counterpart among GPTs"),
        (args_of(), stack_of("M-M-*-M-", hgrn2_expand_ratio=64), "--hgrn2-expand-ratio is 32 here and 64 in"),
        (stack_of("M-M-*-"), args_of(), "--hybrid-layer-pattern is M-M-[*]- here and M-M-[*]-M- in"),
        (stack_of("M-M-*-M-"), args_of(**EXPERTS), "--hybrid-layer-pattern is M-M-[*]-M- here and MEME[*]EME in"),
        (stack_of("MEME*EME", num_experts=2), args_of(**EXPERTS), "--num-experts is 2 here and 4 in"),
        (stack_of("M-*-"), attention_stack_of("*-M-"), "M-[*]- here, and .* to load are [*]-M-:"),
        (stack_of("M-*-"), attention_stack_of("*-*E"), "M-[*]- here, and .* to load are [*]-[*]E:"),
        (stack_of("M-*-"), args_of(spec=None, num_layers=3), "M-[*]- here, and .* to load are [*]-[*]-[*]-:"),
    ],
)
def test_another_model_of_the_other_form_is_refused_by_name(here, saved, message):
    with pytest.raises(UsageError, match=message):
        checkpoint_check.check(here, saved, distributed=True)


def test_a_format_that_depends_on_the_form_is_refused():
    here, saved = args_of(finetune=False), stack_of("M-M-*-M-")
    with pytest.raises(UsageError, match="a HybridModel, and this run builds a GPT: .* --ckpt-format torch_dist"):
        checkpoint_check.check(here, saved, distributed=False)
    with pytest.raises(UsageError, match="dp_reshardable: .* --dist-ckpt-optim-fully-reshardable, or .*--no-load-opt"):
        checkpoint_check.check(here, saved, True, "dp_reshardable")
    checkpoint_check.check(args_of(finetune=False, no_load_optim=True), saved, True, "dp_reshardable")
    checkpoint_check.check(here, args_of(), True, "dp_reshardable")


@pytest.mark.parametrize(
    ("here", "saved", "message"),
    [
        (
            stack_of("M-*-/*-"),
            stack_of("M-*-"),
            "--hybrid-layer-pattern is M-[*]-/[*]- here and M-[*]- in .*--finetune",
        ),
        (stack_of("M-*-"), stack_of("M-*-/*-"), "--hybrid-layer-pattern is M-[*]- here and M-[*]-/[*]- in"),
        (
            stack_of("M-/M-/M-", mtp_use_repeated_layer=True),
            stack_of("M-/M-/M-"),
            "--mtp-use-repeated-layer is True here and False in .*--finetune",
        ),
        (args_of(), stack_of("M-M-*-M-/*-/*-"), "has --hybrid-layer-pattern M-M-[*]-M-/[*]-/[*]-, and a GPT"),
    ],
)
def test_other_heads_for_multi_token_prediction_need_finetune(here, saved, message):
    checkpoint_check.check(here, saved, distributed=True)
    here = argparse.Namespace(**vars(here) | {"finetune": False})
    with pytest.raises(UsageError, match=message):
        checkpoint_check.check(here, saved, distributed=True)
    checkpoint_check.check(here, here, distributed=True)


def test_a_hybrid_model_takes_weights_from_attention():
    for saved in (attention_stack_of("*-*-"), attention_stack_of("M-*-/*-"), args_of(spec=None, num_layers=2)):
        checkpoint_check.check(stack_of("M-*-"), saved, distributed=True)
        checkpoint_check.check(args_of(num_layers=2, hgrn2_layer_pattern="H*"), saved, distributed=True)


def test_a_hybrid_model_takes_the_weights_of_the_same_positions(tmp_path, monkeypatch, capsys):
    """The weights come from a HybridModel whose attention layers and MLPs have the names that Megatron gives them."""
    from megatron.core import dist_checkpointing

    from hgrn2_megatron import checkpoint

    harness.start_megatron()
    # Megatron waits for copies from a GPU
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    given, model = (harness.build_model(hybrid_layer_pattern=pattern) for pattern in ("*-*-M-", "M-*-M-"))
    given.load_state_dict(harness.full_weights(given), strict=False)
    fresh = {name: x.clone() for name, x in model.state_dict().items() if x is not None}
    dist_checkpointing.save(given.sharded_state_dict(), str(tmp_path))
    wanted = {"model": model.sharded_state_dict()}
    args = checkpoint.adapt(stack_of("M-*-M-"), wanted, attention_stack_of("*-*-M-"), str(tmp_path))
    assert not args.ckpt_load_validate_sharding_integrity
    assert "the mixers of layers 1, 5 with their input norms, the lower bounds, the opt" in capsys.readouterr().out
    unbounded = stack_of("M-*-M-", hgrn2_lower_bounds="none")
    checkpoint.adapt(unbounded, {}, attention_stack_of("*-*-M-"), str(tmp_path))
    assert "with their input norms, the optimizer" in capsys.readouterr().out
    model.load_state_dict(dist_checkpointing.load(wanted, str(tmp_path), validate_access_integrity=False)["model"])
    taken, given = dict(model.named_parameters()), dict(given.named_parameters())
    for name, x in taken.items():
        is_fresh = name.startswith(("decoder.layers.0.", "decoder.layers.4.", "decoder.hgrn2_bounds."))
        assert torch.equal(x, fresh[name] if is_fresh else given[name]), name


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"hgrn2_layer_pattern": "HHH*"}, "--hgrn2-layer-pattern is HH[*]H here and HHH[*] in"),
        ({"num_layers": 8}, "--num-layers is 4 here and 8 in"),
        ({"hgrn2_expand_ratio": 64}, "--hgrn2-expand-ratio is 32 here and 64 in"),
        ({"hgrn2_lower_bounds": "none"}, "--hgrn2-lower-bounds is learned here and none in"),
        ({"hgrn2_norm_eps": 1e-4}, "--hgrn2-norm-eps is 1e-05 here and 0.0001 in"),
        ({"layernorm_epsilon": 1e-5}, "--norm-epsilon is False here and 1e-05 in"),
        (
            {"untie_embeddings_and_output_weights": True},
            "--untie-embeddings-and-output-weights is False here and True in",
        ),
        ({"num_attention_heads": 8}, "--num-attention-heads is 4 here and 8 in"),
        ({"qk_l2_norm": True}, "--qk-l2-norm is False here and True in"),
    ],
)
def test_another_hgrn2_model_is_refused_by_name(theirs, message):
    for finetune in (False, True):
        with pytest.raises(UsageError, match=message):
            checkpoint_check.check(args_of(finetune=finetune), args_of(**theirs), distributed=True)
    # the same pattern in other words
    checkpoint_check.check(args_of(hgrn2_layer_pattern="H*"), args_of(hgrn2_layer_pattern="H*H*"), distributed=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"rotary_base": 500},
        {"position_embedding_type": "none"},
        {"rotary_interleaved": True},
        {"rotary_seq_len_interpolation_factor": 2},
    ],
)
def test_other_positions_are_given_on_purpose(changes):
    flag = "--" + next(iter(changes)).replace("_", "-")
    for here, saved in ((args_of, args_of), (lambda **more: stack_of("M-M-*-M-", **more), args_of)):
        with pytest.raises(UsageError, match=f"{flag} is .* on purpose, give --finetune or --no-load-optim"):
            checkpoint_check.check(here(finetune=False), saved(**changes), distributed=True)
        for purpose in ({"finetune": True}, {"finetune": False, "no_load_optim": True}):
            checkpoint_check.check(here(**purpose), saved(**changes), distributed=True)
        # without attention, nothing has positions
        pure = {"hgrn2_layer_pattern": "H", "finetune": False}
        checkpoint_check.check(args_of(**pure), args_of(**pure | changes), distributed=True)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"num_attention_heads": 8}, "--num-attention-heads is 4 here and 8 in"),
        ({"kv_lora_rank": 16}, "--kv-lora-rank is False here and 16 in"),
        ({"rope_type": "rope"}, "--rope-type is False here and rope in .* on purpose"),
        ({"rotary_base": 500}, "--rotary-base is False here and 500 in .* on purpose"),
    ],
)
def test_other_multi_latent_attention_is_refused_by_name(theirs, message):
    here, saved = stack_of("M-+-", finetune=False), stack_of("M-+-", **theirs)
    with pytest.raises(UsageError, match=message):
        checkpoint_check.check(here, saved, distributed=True)
    # it has no such positions
    checkpoint_check.check(here, stack_of("M-+-", position_embedding_type="none"), distributed=True)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 8}, {"rotary_base": 500}])
def test_attention_in_a_head_for_multi_token_prediction_is_compared(changes):
    ((name, value),) = changes.items()
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} is .* here and {value} in"):
        checkpoint_check.check(stack_of("M-/*-", finetune=False), stack_of("M-/*-", **changes), distributed=True)
    # heads that start fresh may differ
    checkpoint_check.check(stack_of("M-/*-"), stack_of("M-/*-/*-", num_attention_heads=8), distributed=True)


@pytest.mark.parametrize(
    ("here", "saved", "optimizer_format", "message"),
    [
        (
            {},
            {"use_distributed_optimizer": True},
            "fully_reshardable",
            "--use-distributed-optimizer is False here and T",
        ),
        ({"use_distributed_optimizer": True}, {}, None, "--use-distributed-optimizer is True here and False in"),
        (
            {"use_distributed_optimizer": True},
            {"use_distributed_optimizer": True, "pipeline_model_parallel_size": 2},
            "dp_reshardable",
            "--pipeline-model-parallel-size is 1 here and 2 in .* --dist-ckpt-optim-fully-reshardable, or ",
        ),
        (
            {"use_distributed_optimizer": True, "hybrid_layer_pattern": "M-|M-*-"},
            {"use_distributed_optimizer": True},
            "dp_reshardable",
            r"--hybrid-layer-pattern is M-\|M-\*- here and M-M-\|\*- in",
        ),
    ],
)
def test_the_state_of_an_optimizer_that_cannot_be_loaded_is_refused(here, saved, optimizer_format, message):
    stack = args_of((arguments.MODULE, arguments.STACK), hybrid_layer_pattern="M-M-|*-", finetune=False)
    args, checkpoint_args = (argparse.Namespace(**vars(stack) | changes) for changes in (here, saved))
    with pytest.raises(UsageError, match=message):
        checkpoint_check.check(args, checkpoint_args, True, optimizer_format)
    # a converted checkpoint has weights only
    checkpoint_check.check(args, checkpoint_args, True, optimizer_format, release=True)
    args.no_load_optim = True
    checkpoint_check.check(args, checkpoint_args, True, optimizer_format)
    checkpoint_check.check(stack, stack, True, optimizer_format)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ({"finetune": False}, {}, "give --finetune"),
        ({}, {"layernorm_epsilon": 1e-5}, "--norm-epsilon"),
        ({}, {"num_attention_heads": 8}, "--num-attention-heads"),
        ({}, {"group_query_attention": True, "num_query_groups": 2}, "--num-query-groups is 4 here and 2 in"),
        ({}, {"position_embedding_type": "learned_absolute"}, "--position-embedding-type"),
        (
            {"hgrn2_layer_pattern": "H", "position_embedding_type": "none"},
            {"position_embedding_type": "learned_absolute"},
            "--position-embedding-type",
        ),
    ],
)
def test_another_attention_model_is_refused_by_name(ours, theirs, message):
    with pytest.raises(UsageError, match=message):
        checkpoint_check.check(args_of(**ours), args_of(spec=None, **theirs), distributed=True)


def test_a_pure_stack_takes_what_is_equal_of_any_attention():
    ours = args_of(hgrn2_layer_pattern="H", position_embedding_type="none")
    checkpoint_check.check(ours, args_of(spec=None, num_attention_heads=8), distributed=True)


def test_an_hgrn2_checkpoint_is_not_of_attention():
    with pytest.raises(UsageError, match="give --spec hgrn2"):
        checkpoint_check.check(args_of(spec=None), args_of(), distributed=True)


def test_plain_checkpoints_stay_with_their_implementation():
    for distributed in (True, False):
        checkpoint_check.check(args_of(), args_of(), distributed)
    checkpoint_check.check(args_of(), args_of(transformer_impl="transformer_engine"), distributed=True)
    with pytest.raises(UsageError, match="--transformer-impl"):
        checkpoint_check.check(args_of(), args_of(transformer_impl="transformer_engine"), distributed=False)
    with pytest.raises(UsageError, match="--ckpt-format"):
        checkpoint_check.check(args_of(), args_of(spec=None), distributed=False)
