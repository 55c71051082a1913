"""Checkpoints move between layouts, with the optimizer's state: real runs through the launcher, compared by losses."""

import pytest
from training import HGRN2, train

MODEL = (*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "H*HH")
PP2 = ("--pipeline-model-parallel-size", 2)
LAYOUTS = {
    "pp2": (2, PP2),
    "pp2-vpp2": (2, (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)),
    "tp2-pp2": (4, (*PP2, "--tensor-model-parallel-size", 2, "--sequence-parallel")),
}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Losses of a run on one process, and its checkpoint of iteration 4."""
    folder = tmp_path_factory.mktemp("one")
    losses, _ = train(*MODEL, "--save", folder, "--save-interval", 4)
    return losses, folder


@pytest.fixture(scope="module")
def moved(one_process, tmp_path_factory):
    """Iterations 5 and 6 in every layout from one process's checkpoint: losses, and the layout's own checkpoint."""
    result = {}
    for name, (num_processes, flags) in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        files = ("--load", one_process[1], "--ckpt-step", 4, "--save", folder, "--save-interval", 6)
        losses, _ = train(*MODEL, *flags, *files, "--exit-interval", 6, num_processes=num_processes)
        result[name] = losses, folder
    return result


def assert_continues(losses, one_process, first):
    # the second line that any Megatron run logs is the mean of its first two iterations
    for i in (first, *(i for i in losses if i > first + 1)):
        assert abs(float(losses[i]) - float(one_process[0][i])) < 2e-6, i


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_one_process(layout, one_process, moved):
    losses, _ = moved[layout]
    assert sorted(losses) == [5, 6]
    assert_continues(losses, one_process, 5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_one_process(layout, one_process, moved):
    losses, _ = train(*MODEL, "--load", moved[layout][1])
    assert sorted(losses) == [7, 8]
    assert_continues(losses, one_process, 7)


@pytest.mark.parametrize(("saved", "loaded"), [("pp2", "pp2-vpp2"), ("pp2-vpp2", "pp2")])
def test_between_pipelines(saved, loaded, one_process, moved):
    num_processes, flags = LAYOUTS[loaded]
    losses, _ = train(*MODEL, *flags, "--load", moved[saved][1], num_processes=num_processes)
    assert sorted(losses) == [7, 8]
    assert_continues(losses, one_process, 7)
