"""Virtual pipeline stages with data or context parallelism save, resume and move to one process and back: real runs."""

import pytest
from training import ASYNC, HGRN2, STACK, assert_continues, assert_equal, saved_tensors, train

PP2 = ("--pipeline-model-parallel-size", 2)
# what one process takes, and two stages of two virtual ones each
FORMS = {
    "gpt": (
        "examples/pretrain_gpt.py",
        (*HGRN2, "--num-layers", 4),
        (*HGRN2, "--num-layers", 4, *PP2, "--num-layers-per-virtual-pipeline-stage", 1),
    ),
    "stack": (
        "examples/pretrain_hybrid.py",
        (*STACK, "--hybrid-layer-pattern", "M-M-M-M-"),
        (*STACK, "--hybrid-layer-pattern", "M-|M-|M-|M-", *PP2),
    ),
}
LAYOUTS = {"dp2": ("--micro-batch-size", 1), "cp2": ("--context-parallel-size", 2)}
DISTRIBUTED = ("--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")


@pytest.mark.parametrize(
    ("form", "layout", "flags", "moves"),
    [
        ("gpt", "dp2", (*DISTRIBUTED, "--ckpt-fully-parallel-load"), True),
        ("gpt", "cp2", (), False),
        ("stack", "dp2", (*ASYNC, "--ckpt-fully-parallel-load"), False),
        ("stack", "cp2", DISTRIBUTED, True),
    ],
)
def test_checkpoints_of_virtual_stages(form, layout, flags, moves, tmp_path):
    script, one_process, stages = FORMS[form]

    def run(name, model, num_processes, *source):
        files = ("--save", tmp_path / name, "--save-interval", 2, *source)
        return train(*model, *flags, *files, script=script, num_processes=num_processes)[0]

    def run_stages(name, *source):
        return run(name, (*stages, *LAYOUTS[layout]), 4, *source)

    def saved(name):
        return saved_tensors(tmp_path / name, 8)

    losses = run_stages("stages")
    assert sorted(losses) == list(range(1, 9))
    resumed = run_stages("resumed", "--load", tmp_path / "stages", "--ckpt-step", 4)
    assert_continues(resumed, losses)
    assert_equal(saved("resumed"), saved("stages"))

    if not moves:
        return
    alone = run("one", one_process, 1, "--load", tmp_path / "stages", "--ckpt-step", 4)
    assert_continues(alone, losses, tolerance=2e-6)
    back = run_stages("back", "--load", tmp_path / "one", "--ckpt-step", 6)
    for i in (7, 8):
        # the second line that a run logs is the mean of its first two iterations
        expected = losses[7] if i == 7 else str((float(losses[7]) + float(losses[8])) / 2)
        assert abs(float(back[i]) - float(expected)) < 2e-6
