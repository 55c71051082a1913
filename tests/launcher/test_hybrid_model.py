"""Megatron's HybridModel through the launcher: real runs, compared with the GPT form, whose checkpoints it shares."""

import re

import harness
import pytest
from training import FLAGS, HGRN2, STACK, assert_continues, assert_equal, launch, saved_tensors, train

from hgrn2_megatron import forms

OURS = "examples/pretrain_hybrid.py"
PATTERN = ("--hybrid-layer-pattern", "M-M-*-M-")
GPT = (*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "HH*H")


@pytest.fixture(scope="module", autouse=True)
def products_of_one_rounding():
    """On some CPUs MKL, left to itself, rounds the same product otherwise in the two forms of a model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MKL_CBWR", "COMPATIBLE")
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An uninterrupted run that saved its state after iteration 4: (losses, output, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    losses, output = train(*STACK, *PATTERN, "--save", folder, "--save-interval", 4, script=OURS)
    return losses, output, folder


@pytest.fixture(scope="module")
def gpt_run(tmp_path_factory):
    """The same run in the GPT form: (losses, checkpoint folder)."""
    folder = tmp_path_factory.mktemp("gpt")
    losses, _ = train(*GPT, "--save", folder, "--save-interval", 4)
    return losses, folder


def test_the_run_is_that_of_the_gpt_form(run, gpt_run):
    losses, output, _ = run
    assert "HGRN2: 3 of 4 layers, expand 32, lower bounds learned, op=pytorch" in output
    assert float(losses[8]) < float(losses[1]) - 0.3
    assert losses == gpt_run[0]


def test_a_resumed_run_takes_the_model_from_the_checkpoint(run):
    files = ("--load", run[2], "--ckpt-step", 4, "--use-checkpoint-args", "--hgrn2-expand-ratio", 16)
    losses, output = train(*files, script=OURS)
    assert "HGRN2: 3 of 4 layers, expand 32" in output
    assert_continues(losses, run[0])


def test_a_resumed_run_may_divide_the_layers_among_stages(run, tmp_path):
    stages = ("--pipeline-model-parallel-size", 2, "--hybrid-layer-pattern", "M-|M-|*-|M-")
    files = ("--load", run[2], "--ckpt-step", 4, "--save", tmp_path, "--save-interval", 8)
    losses, _ = train(*STACK, *stages, *files, script=OURS, num_processes=2)
    assert_continues(losses, run[0], tolerance=2e-6)


@pytest.fixture(scope="module")
def stages(run, tmp_path_factory):
    """A checkpoint of the run above after iteration 6, on two stages of two virtual ones each, as its pattern says."""
    folder = tmp_path_factory.mktemp("stages")
    stages = ("--pipeline-model-parallel-size", 2, "--hybrid-layer-pattern", "M-|M-|*-|M-")
    files = ("--load", run[2], "--ckpt-step", 4, "--save", folder, "--save-interval", 6, "--exit-interval", 6)
    train(*STACK, *stages, *files, script=OURS, num_processes=2)
    return folder


@pytest.mark.parametrize(("flags", "num_processes"), [((), 1), (("--pipeline-model-parallel-size", 2), 2)])
def test_a_checkpoint_of_stages_says_what_model_it_is_to_any_number_of_them(flags, num_processes, run, stages):
    files = ("--load", stages, "--ckpt-step", 6, "--use-checkpoint-args")
    losses, output = train(*files, *flags, script=OURS, num_processes=num_processes)
    assert "HGRN2: 3 of 4 layers, expand 32" in output
    assert sorted(losses) == [7, 8] and abs(float(losses[7]) - float(run[0][7])) < 2e-6


def test_stages_on_the_command_line_must_be_those_of_the_run():
    done = launch(*STACK, "--hybrid-layer-pattern", "M-|M-|*-|M-", script=OURS)
    message = "--hybrid-layer-pattern 'M-|M-|*-|M-' has 4 segments for --pipeline-model-parallel-size 1: "
    assert done.returncode != 0 and f"hgrn2_megatron: error: {message}" in done.stdout, done.stdout[-2000:]


def test_a_checkpoint_moves_to_the_other_form_and_back(gpt_run, tmp_path):
    """Both runs take the model from the checkpoint, and only the name of the script says which form they build."""
    losses, gpt = gpt_run
    flags = ("--use-checkpoint-args", "--ckpt-step", 4, "--override-opt-param-scheduler")
    # The first run has no step left to train, so it saves what it loads.
    files = ("--load", gpt, "--save", tmp_path / "stack", "--save-interval", 3)
    train(*flags, *files, "--train-iters", 4, script=OURS)
    moved = {forms.stack_name(name): x for name, x in saved_tensors(gpt, 4).items()}
    assert "optimizer.state.exp_avg.decoder.layers.5.mlp.linear_fc2.weight" in moved
    assert_equal(saved_tensors(tmp_path / "stack", 4), moved)

    files = ("--load", tmp_path / "stack", "--save", tmp_path / "gpt", "--save-interval", 8)
    back, _ = train(*flags, *files, "--num-layers", 4)
    assert_continues(back, losses)
    assert_equal(saved_tensors(tmp_path / "gpt", 8), saved_tensors(gpt, 8))


def test_a_checkpoint_moves_to_the_other_form_in_another_layout(tmp_path):
    """Experts, and the distributed optimizer: virtual stages and data parallelism on one side, stages on the other."""
    experts = ("--num-experts", 4, "--micro-batch-size", 1, "--train-iters", 7)
    stages = ("--pipeline-model-parallel-size", 2, "--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable")
    model = (*GPT, *experts, "--moe-layer-freq", "[0,1,0,1]", "--num-layers-per-virtual-pipeline-stage", 1)
    losses, _ = train(*model, *stages, "--save", tmp_path, "--save-interval", 4, num_processes=4)
    pattern = ("--hybrid-layer-pattern", "M-ME|*-ME")
    files = ("--load", tmp_path, "--ckpt-step", 4)
    moved, _ = train(*STACK, *pattern, *experts, *stages, *files, script=OURS, num_processes=2)
    assert_continues(moved, losses, tolerance=2e-6)


EXPERTS = ("--num-experts", 2, "--moe-aux-loss-coeff", 1e-2, "--moe-z-loss-coeff", 1e-3, "--train-iters", 4)


@pytest.mark.parametrize(
    ("pattern", "kind", "name"),
    [
        ("ME|M-", "aux_loss", "load_balancing_loss"),
        ("M-|ME", "seq_aux_loss", "seq_load_balancing_loss"),
        ("M-|M-|ME|M-/ME", "global_aux_loss", "global_load_balancing_loss"),
    ],
)
def test_a_stage_without_experts_logs_the_losses_of_those_of_others(pattern, kind, name, tmp_path):
    """Megatron before 0.20 makes room for another number of values there, and the sum over stages never ends."""
    experts = (*STACK, *EXPERTS, "--moe-router-load-balancing-type", kind)
    stages = ("--pipeline-model-parallel-size", 2, "--distributed-timeout-minutes", 1)
    logged = []
    for layers, flags, num_processes in (
        (pattern.replace("|", ""), ("--save", tmp_path, "--save-interval", 2), 1),
        (pattern, ("--load", tmp_path, "--ckpt-step", 2, *stages), 2),
    ):
        model = (*experts, "--hybrid-layer-pattern", layers)
        _, output = train(*model, *flags, script=OURS, num_processes=num_processes)
        # the second line that a run logs would be the mean of two iterations
        logged.append(re.findall(rf"iteration +3/.* (lm loss): (\S+) .* ({name}): (\S+) .*(z_loss): (\S+) ", output))
    (one,), (two,) = logged
    assert one[::2] == ("lm loss", name, "z_loss")
    one, two = ([*map(float, line[1::2])] for line in (one, two))
    assert all(one) and two == pytest.approx(one, rel=2e-5)


WITHOUT_LAUNCHER = """
import runpy, sys
from hgrn2_megatron import cpu
cpu.install()
sys.argv = sys.argv[1:]
sys.path.insert(0, "examples")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_the_launcher_the_spec_alone_makes_the_model(tmp_path):
    script = tmp_path / "on_the_cpu.py"
    script.write_text(WITHOUT_LAUNCHER)
    at = FLAGS.index("--hgrn2-expand-ratio")
    flags = [*FLAGS[:at], *FLAGS[at + 2 :], *STACK, *PATTERN, "--hidden-size", "128"]
    flags += "--normalization RMSNorm --disable-bias-linear --swiglu --position-embedding-type rope".split()
    flags += "--distributed-backend gloo --transformer-impl local --no-gradient-accumulation-fusion".split()
    flags += "--no-rope-fusion --no-persist-layer-norm".split()
    done = harness.torchrun(1, str(script), OURS, *flags)
    assert "HGRN2: 3 of 4 layers, expand 128, lower bounds learned" in done.stdout, done.stdout[-3000:]
    assert "iteration        8/" in done.stdout
