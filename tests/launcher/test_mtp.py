"""Multi-token prediction through the launcher: training, its logged losses, exact resume, and the static engine."""

import json
import re

import harness
import pytest
from training import STACK, assert_continues, train

OURS = "examples/pretrain_hybrid.py"
HEADS = "/M-/M-"


def logged(output: str, name: str) -> list[float]:
    return [float(loss) for loss in re.findall(rf"{name}: (\S+)", output)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run that saved its state after iteration 4: (losses, output, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = (*STACK, "--hybrid-layer-pattern", "M-*-" + HEADS)
    losses, output = train(*model, "--save", folder, "--save-interval", 4, script=OURS)
    return losses, output, folder


def test_the_heads_learn(run):
    losses, output, _ = run
    assert "HGRN2: 1 of 2 layers, 2 MTP heads (M-), expand 32, lower bounds learned, op=pytorch" in output
    assert "no effect" not in output
    for name in ("lm loss", "mtp_1 loss", "mtp_2 loss"):
        values = logged(output, name)
        assert values[7] < values[0] - 0.1, (name, values)


@pytest.mark.parametrize(
    "flags",
    [
        ("--pipeline-model-parallel-size", 2, *STACK, "--hybrid-layer-pattern", "M-|*-" + HEADS),
        ("--tensor-model-parallel-size", 2, "--sequence-parallel", "--use-checkpoint-args"),
    ],
    ids=["pp2", "tp2"],
)
def test_a_resumed_run_may_divide_the_model_otherwise(flags, run, tmp_path):
    files = ("--load", run[2], "--ckpt-step", 4, "--save", tmp_path, "--save-interval", 8)
    losses, output = train(*flags, *files, script=OURS, num_processes=2)
    assert "1 of 2 layers, 2 MTP heads (M-), expand 32" in output
    assert_continues(losses, run[0], tolerance=2e-6)
    for name in ("mtp_1 loss", "mtp_2 loss"):
        assert logged(output, name)[0] == pytest.approx(logged(run[1], name)[4], rel=2e-6)


def test_megatrons_static_engine_takes_the_likeliest_tokens():
    settings = json.dumps({"hybrid_layer_pattern": "M-*-" + HEADS})
    done = harness.python("tests/launcher/static_engine.py", "1", "legacy", "40", settings)
    assert done.stdout.count("40 of 40 right") == 4, done.stdout[-3000:]


def test_unmodified_megatron_lm_script(run, megatron_lm):
    losses, output = train(
        *STACK, "--hybrid-layer-pattern", "M-*-" + HEADS, script=str(megatron_lm / "pretrain_hybrid.py")
    )
    assert losses == run[0] and logged(output, "mtp_2 loss") == logged(run[1], "mtp_2 loss")
