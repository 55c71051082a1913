"""Megatron's HybridModel through the launcher: real runs, compared by losses with those of the GPT form."""

import re

import harness
import pytest
from training import FLAGS, HGRN2, STACK, assert_continues, launch, train

OURS = "examples/pretrain_hybrid.py"
PATTERN = ("--hybrid-layer-pattern", "M-M-*-M-")


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


def test_the_run_is_that_of_the_gpt_form(run):
    losses, output, _ = run
    assert "HGRN2: 3 of 4 layers, expand 32, lower bounds learned, op=pytorch" in output
    assert float(losses[8]) < float(losses[1]) - 0.3
    gpt, _ = train(*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "HH*H")
    assert losses == gpt


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


@pytest.fixture(scope="module")
def gpt_checkpoint(tmp_path_factory):
    """A checkpoint of the GPT form."""
    folder = tmp_path_factory.mktemp("gpt")
    model = (*HGRN2, "--num-layers", 4, "--hgrn2-layer-pattern", "HH*H")
    train(*model, "--save", folder, "--save-interval", 2, "--exit-interval", 2)
    return folder


GPT_FORM = (("examples/pretrain_gpt.py", *HGRN2, "--num-layers", 4), "pretrain_gpt.py with --spec hgrn2 ")
STACK_FORM = ((OURS, *STACK, *PATTERN), "pretrain_hybrid.py with --spec hgrn2_stack ")


@pytest.mark.parametrize("flags", [(), ("--use-checkpoint-args",)])
@pytest.mark.parametrize("theirs", ["gpt", "stack"])
def test_a_checkpoint_of_the_other_form_is_refused_with_what_to_run_instead(theirs, flags, run, gpt_checkpoint):
    ours, other, folder = (STACK_FORM, GPT_FORM, gpt_checkpoint) if theirs == "gpt" else (GPT_FORM, STACK_FORM, run[2])
    (script, *model), (_, instead) = ours[0], other
    done = launch(*model, "--load", folder, *flags, script=script)
    errors = [line for line in done.stdout.splitlines() if "hgrn2_megatron: error: " in line]
    assert done.returncode != 0 and len(errors) == 1, done.stdout[-2000:]
    assert " in the checkpoint to load: " in errors[0] and f"run {instead}and --use-checkpoint-args" in errors[0]


def test_the_advice_of_that_refusal_works(gpt_checkpoint):
    # that of a HybridModel's checkpoint is the resumed run above
    (script, *model), _ = GPT_FORM
    losses, _ = train(*model, "--load", gpt_checkpoint, "--use-checkpoint-args", script=script)
    assert sorted(losses) == list(range(3, 9))


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


def test_unmodified_megatron_lm_script(run, megatron_lm):
    losses, _ = train(*STACK, *PATTERN, script=str(megatron_lm / "pretrain_hybrid.py"))
    assert losses == run[0]
