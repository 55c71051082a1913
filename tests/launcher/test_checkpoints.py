"""Checkpoints that are saved in the background or cut off, of another model, and of attention: real runs."""

import argparse

import harness
import pytest
from training import ASYNC, HGRN2, assert_continues, assert_equal, launch, saved_tensors, train

from hgrn2_megatron import UsageError, arguments, checkpoint

PP2 = ("--pipeline-model-parallel-size", 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run that saved every second iteration: losses, and the folder."""
    folder = tmp_path_factory.mktemp("run")
    losses, _ = train(*HGRN2, "--save", folder, "--save-interval", 2)
    return losses, folder


def test_an_asynchronous_save_is_the_same_checkpoint(run, tmp_path):
    files = ("--save", tmp_path, "--save-interval", 4, *ASYNC)
    losses, output = train(*HGRN2, *files)
    assert losses == run[0]
    assert "scheduled an async checkpoint save at iteration       4" in output
    for iteration in (4, 8):
        assert_equal(saved_tensors(tmp_path, iteration), saved_tensors(run[1], iteration))
    resumed, _ = train(*HGRN2, *files, "--load", tmp_path, "--ckpt-step", 4)
    assert_continues(resumed, losses)
    assert_equal(saved_tensors(tmp_path, 8), saved_tensors(run[1], 8))


def test_a_run_killed_while_it_saves_loses_nothing_that_was_saved_before(run, tmp_path, monkeypatch):
    monkeypatch.setenv("KILL_ITERATION", "6")
    files = ("--save", tmp_path, "--save-interval", 2)
    done = launch(*HGRN2, *files, script="tests/launcher/killed_while_saving.py")
    assert done.returncode != 0 and "SIGKILL" in done.stdout, done.stdout[-2000:]
    half = tmp_path / "iter_0000006"
    assert sum(file.stat().st_size for file in half.iterdir()) > 0 and not (half / ".metadata").exists()
    resumed, _ = train(*HGRN2, *files, "--load", tmp_path)
    assert_continues(resumed, run[0])
    for iteration in (4, 6, 8):
        assert_equal(saved_tensors(tmp_path, iteration), saved_tensors(run[1], iteration))


DEPTH = ("--num-layers", 4, "--ffn-hidden-size", 192)
BLOCK = "--normalization RMSNorm --disable-bias-linear --swiglu --norm-epsilon 1e-6".split()
HYBRID = (*HGRN2, "--hgrn2-layer-pattern", "H*H*")


@pytest.fixture(scope="module")
def attention(tmp_path_factory):
    """A checkpoint of iteration 2 of an ordinary Megatron GPT, saved under the launcher."""
    folder = tmp_path_factory.mktemp("attention")
    flags = (*DEPTH, *BLOCK, "--position-embedding-type", "rope", "--hidden-dropout", 0, "--attention-dropout", 0)
    train(*flags, "--save", folder, "--save-interval", 2, "--exit-interval", 2)
    return folder


@pytest.mark.parametrize(
    ("num_processes", "flags"),
    [(1, ()), (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", 1, "--use-checkpoint-args"))],
    ids=["one", "pp2-vpp2-checkpoint-args"],
)
def test_attention_gives_a_hybrid_what_is_equal(num_processes, flags, attention, tmp_path):
    # a learning rate of zero leaves the weights as they were loaded
    files = ("--load", attention, "--finetune", "--lr", 0, "--save", tmp_path, "--save-interval", 1)
    _, output = train(*DEPTH, *HYBRID, *flags, *files, "--exit-interval", 1, num_processes=num_processes)
    assert "HGRN2: 2 of 4 layers" in output
    assert "HGRN2: loading 2 of 4 mixers and all other shared weights from an attention checkpoint" in output
    given = {name: x for name, x in saved_tensors(attention, 2).items() if not name.startswith("optimizer")}
    taken = {name: x for name, x in saved_tensors(tmp_path, 1).items() if not name.startswith("optimizer")}

    equal = {}
    for name, x in given.items():
        if name.startswith("decoder.layers."):
            rest = name.removeprefix("decoder.layers.")
            layers = (1, 3) if rest.startswith("self_attention") else range(4)
            equal |= {f"decoder.layers.{layer}.{rest}": x[layer] for layer in layers}
        else:
            equal[name] = x
    assert_equal({name: taken[name] for name in equal}, equal)
    fresh = taken.keys() - equal.keys()
    assert all(
        name.startswith(("decoder.layers.0.self_att", "decoder.layers.2.self_att", "decoder.hgrn2_bounds"))
        for name in fresh
    )
    assert (taken["decoder.hgrn2_bounds.weight"] == 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (HYBRID, "give --finetune"),
        ((*HYBRID, "--finetune", "--num-layers", 2), "--num-layers is 2 here and 4 in the checkpoint"),
    ],
)
def test_an_attention_checkpoint_is_refused_by_name(flags, message, attention):
    done = launch(*DEPTH, *flags, "--load", attention)
    assert done.returncode != 0 and "iteration        1/" not in done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("hgrn2_megatron: error:")]
    assert len(errors) == 1 and message in errors[0], done.stdout[-2000:]


def args_of(spec=(arguments.MODULE, arguments.GPT), **changes) -> argparse.Namespace:
    """What Megatron's args say of a model of four layers."""
    names = {*checkpoint.BLOCK_FLAGS.values(), *checkpoint.ATTENTION_FLAGS.values()}
    values = dict.fromkeys(names) | dict(
        spec=spec and list(spec),
        num_layers=4,
        num_attention_heads=4,
        hgrn2_layer_pattern="HH*H",
        hgrn2_expand_ratio=32,
        hgrn2_lower_bounds="learned",
        group_query_attention=False,
        position_embedding_type="rope",
        transformer_impl="local",
        finetune=True,
    )
    return argparse.Namespace(**values | changes)


def test_a_hybrid_model_takes_nothing_from_other_models():
    stack = dict(spec=(arguments.MODULE, arguments.STACK), hybrid_layer_pattern="M-*-")
    with pytest.raises(UsageError, match="a HybridModel takes no weights"):
        checkpoint.check(args_of(**stack), args_of(spec=None, hybrid_layer_pattern="M-*-"), distributed=True)
    checkpoint.check(args_of(**stack), args_of(**stack), distributed=True)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"hgrn2_layer_pattern": "HHH*"}, "--hgrn2-layer-pattern is HH[*]H here and HHH[*] in"),
        ({"num_layers": 8}, "--num-layers is 4 here and 8 in"),
        ({"hgrn2_expand_ratio": 64}, "--hgrn2-expand-ratio is 32 here and 64 in"),
        ({"hgrn2_lower_bounds": "none"}, "--hgrn2-lower-bounds is learned here and none in"),
    ],
)
def test_another_hgrn2_model_is_refused_by_name(theirs, message):
    for finetune in (False, True):
        with pytest.raises(UsageError, match=message):
            checkpoint.check(args_of(finetune=finetune), args_of(**theirs), distributed=True)
    # the same pattern in other words
    checkpoint.check(args_of(hgrn2_layer_pattern="H*"), args_of(hgrn2_layer_pattern="H*H*"), distributed=True)


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
        checkpoint.check(args_of(**ours), args_of(spec=None, **theirs), distributed=True)


def test_a_pure_stack_takes_what_is_equal_of_any_attention():
    ours = args_of(hgrn2_layer_pattern="H", position_embedding_type="none")
    checkpoint.check(ours, args_of(spec=None, num_attention_heads=8), distributed=True)


def test_an_hgrn2_checkpoint_is_not_of_attention():
    with pytest.raises(UsageError, match="give --spec hgrn2"):
        checkpoint.check(args_of(spec=None), args_of(), distributed=True)


def test_plain_checkpoints_stay_with_their_implementation():
    for distributed in (True, False):
        checkpoint.check(args_of(), args_of(), distributed)
    checkpoint.check(args_of(), args_of(transformer_impl="transformer_engine"), distributed=True)
    with pytest.raises(UsageError, match="--transformer-impl"):
        checkpoint.check(args_of(), args_of(transformer_impl="transformer_engine"), distributed=False)
    with pytest.raises(UsageError, match="--ckpt-format"):
        checkpoint.check(args_of(), args_of(spec=None), distributed=False)


def test_checkpoint_args_of_another_model():
    ours = args_of(layernorm_epsilon=1e-6)
    # every run through the launcher saves the plugin's flags
    checkpoint.restore(ours, args_of(spec=None, hgrn2_layer_pattern="H", layernorm_epsilon=1e-5))
    assert (ours.hgrn2_layer_pattern, ours.layernorm_epsilon) == ("HH*H", 1e-5)
    checkpoint.restore(ours, args_of(hgrn2_layer_pattern="H"))
    assert ours.hgrn2_layer_pattern == "H"
    saved = dict(
        hgrn2_expand_ratio=64,
        hgrn2_layer_pattern="HHHH",
        hgrn2_lower_bounds="none",
        hgrn2_norm_eps=1e-3,
        layernorm_epsilon=1e-4,
    )
    checkpoint.restore(ours, args_of(**saved))
    assert {name: getattr(ours, name) for name in saved} == saved
    with pytest.raises(UsageError, match="--use-checkpoint-args"):
        checkpoint.restore(args_of(spec=("their.module", "stack")), args_of(spec=("their.module", "stack")))


def test_checkpoints_are_checked_without_the_launcher():
    code = """
from hgrn2_megatron import cpu
cpu.install()
import hgrn2_megatron.spec, megatron.training.checkpointing as checkpointing
print("checked", hasattr(checkpointing._load_base_checkpoint, "_hgrn2_original"), hgrn2_megatron.spec.__file__)
"""
    assert "checked True" in harness.python("-c", code).stdout
