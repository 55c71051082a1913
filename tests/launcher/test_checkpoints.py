"""Checkpoints that are saved in the background or cut off, of another model, and of attention: real runs."""

import harness
import pytest
from training import ASYNC, HGRN2, STACK, assert_continues, assert_equal, launch, saved_tensors, train

from hgrn2_megatron import forms

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


# Both take attention layers of the same depth. Megatron itself gives --finetune with --pretrained-checkpoint.
TAKERS = {
    "gpt": (
        *DEPTH,
        *HYBRID,
        *PP2,
        *("--num-layers-per-virtual-pipeline-stage", 1, "--use-checkpoint-args", "--finetune", "--load"),
    ),
    "stack": (*DEPTH, *STACK, *PP2, "--hybrid-layer-pattern", "M-*-|M-*-", "--pretrained-checkpoint"),
}


@pytest.mark.parametrize("form", TAKERS)
def test_attention_gives_a_hybrid_what_is_equal(form, attention, tmp_path):
    # a learning rate of zero leaves the weights as they were loaded
    files = (attention, "--lr", 0, "--save", tmp_path, "--save-interval", 1, "--exit-interval", 1)
    script = "examples/pretrain_hybrid.py" if form == "stack" else "examples/pretrain_gpt.py"
    _, output = train(*TAKERS[form], *files, script=script, num_processes=2)
    assert "HGRN2: 2 of 4 layers" in output
    assert "HGRN2: loading 2 of 4 mixers and all other shared weights from an attention checkpoint" in output
    given = {name: x for name, x in saved_tensors(attention, 2).items() if not name.startswith("optimizer")}
    taken = {name: x for name, x in saved_tensors(tmp_path, 1).items() if not name.startswith("optimizer")}
    if form == "stack":
        taken = {forms.gpt_name(name): x for name, x in taken.items()}

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


def test_checkpoints_are_checked_without_the_launcher():
    code = """
from hgrn2_megatron import cpu
cpu.install()
import hgrn2_megatron.spec, megatron.training.checkpointing as checkpointing
print("checked", hasattr(checkpointing._load_base_checkpoint, "_hgrn2_original"), hgrn2_megatron.spec.__file__)
"""
    assert "checked True" in harness.python("-c", code).stdout
