"""Checkpoints move between layouts: real runs through the launcher, compared by losses, weights and optimizer state."""

import harness
import pytest
from training import HGRN2, assert_equal, saved_tensors, train

MODEL = (*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "H*HH")
PP2 = ("--pipeline-model-parallel-size", 2)
TP2 = ("--tensor-model-parallel-size", 2)
LAYOUTS = {
    "one": (1, ()),
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "pp2-vpp2": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)),
    "tp2-pp2": (4, (*PP2, *TP2, "--sequence-parallel")),
}
OTHERS = [layout for layout in LAYOUTS if layout != "one"]


def run(layout, folder, *flags):
    """Train in a layout up to iteration 8, saving every second: losses, and the folder."""
    num_processes, layout_flags = LAYOUTS[layout]
    files = ("--save", folder, "--save-interval", 2)
    losses, _ = train(*MODEL, *layout_flags, *files, *flags, num_processes=num_processes)
    return losses, folder


def resume(layout, saved, iteration, folder):
    """The same from a checkpoint of another run."""
    losses, _ = run(layout, folder, "--load", saved, "--ckpt-step", iteration)
    assert sorted(losses) == list(range(iteration + 1, 9))
    return losses, folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """An uninterrupted run on one process."""
    return run("one", tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def moved(one_process, tmp_path_factory):
    """Every other layout from one process's iteration 4."""
    return {layout: resume(layout, one_process[1], 4, tmp_path_factory.mktemp(layout)) for layout in OTHERS}


def assert_continues(run, one_process, first):
    """Losses from iteration `first` on, and all that is saved after its step and the next, are one process's."""
    losses, folder = run
    # the second line that any Megatron run logs is the mean of its first two iterations
    for i in (first, *(i for i in losses if i > first + 1)):
        assert abs(float(losses[i]) - float(one_process[0][i])) < 2e-6, i
    iteration = first + 1
    harness.assert_all_close(saved_tensors(folder, iteration), saved_tensors(one_process[1], iteration), tolerance=1e-5)


@pytest.mark.parametrize("layout", OTHERS)
def test_from_one_process(layout, one_process, moved):
    assert_continues(moved[layout], one_process, 5)


@pytest.mark.parametrize("layout", OTHERS)
def test_to_one_process(layout, one_process, moved, tmp_path):
    assert_continues(resume("one", moved[layout][1], 6, tmp_path), one_process, 7)


@pytest.mark.parametrize(("saved", "loaded"), [("pp2", "pp2-vpp2"), ("pp2-vpp2", "pp2")])
def test_between_pipelines(saved, loaded, one_process, moved, tmp_path):
    assert_continues(resume(loaded, moved[saved][1], 6, tmp_path), one_process, 7)


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2"])
def test_a_resume_in_the_same_layout_is_exact(layout, one_process, moved, tmp_path):
    losses, saved = one_process if layout == "one" else moved[layout]
    resumed, folder = resume(layout, saved, 6, tmp_path)
    assert resumed[7] == losses[7]
    assert_equal(saved_tensors(folder, 8), saved_tensors(saved, 8))


def test_another_padding_of_the_vocabulary_is_named_once(one_process, tmp_path):
    other = (*MODEL, "--load", one_process[1], "--make-vocab-size-divisible-by", 192)
    _, output = train(*other, "--ckpt-step", 6, num_processes=2)
    assert output.count("HGRN2 warning: the vocabulary has ") == 1, output[-3000:]
    _, output = train(*MODEL, "--load", one_process[1], "--ckpt-step", 6)
    assert "the vocabulary has" not in output
