"""The unmodified scripts of a Megatron-LM checkout, compared by losses with the scripts here on the installed release.

The environment variable MEGATRON_LM names the checkout.
"""

import functools

import pytest
from patched_tree import ALONE, CPU, patched_copy
from training import HGRN2, STACK, train

EXPERTS = ("--num-experts", 2, "--moe-token-dispatcher-type", "allgather", "--moe-aux-loss-coeff", 1e-2)
# script -> model -> its flags
MODELS = {
    "pretrain_gpt.py": {
        "pure": HGRN2,
        "hybrid": (*HGRN2, "--hgrn2-layer-pattern", "H*"),
        "experts": (*HGRN2, "--hgrn2-layer-pattern", "H*", *EXPERTS, "--moe-layer-freq", "[1,0]"),
    },
    "pretrain_hybrid.py": {
        "pure": (*STACK, "--hybrid-layer-pattern", "M-M-"),
        "hybrid": (*STACK, "--hybrid-layer-pattern", "M-*-"),
        "experts": (*STACK, "--hybrid-layer-pattern", "ME*-", *EXPERTS),
        "heads": (*STACK, "--hybrid-layer-pattern", "M-*-/M-"),
    },
}
LENGTH = ("--train-iters", 4, "--save-interval", 2)


@pytest.fixture(scope="module")
def run(megatron_lm, tmp_path_factory):
    """Return a function that trains a model and returns (losses, output, checkpoint folder). It runs each case once.

    Its arguments are the script, the model, and the Megatron: "release" is the installed one, "launcher" is the
    checkout through the launcher, and "patch" is a patched copy of the checkout without the launcher. Further arguments
    are flags.
    """
    # On some CPUs MKL, left to itself, rounds the same product otherwise in a buffer of another alignment.
    environment = pytest.MonkeyPatch()
    environment.setenv("MKL_CBWR", "COMPATIBLE")
    checkout = megatron_lm.resolve()
    patched = functools.cache(lambda: patched_copy(checkout, tmp_path_factory.mktemp("patched")))

    @functools.cache
    def run(script: str, model: str, megatron: str, *flags):
        if not (checkout / script).is_file():
            pytest.skip(f"this Megatron-LM has no {script}")
        folder = tmp_path_factory.mktemp("checkpoint")
        flags = (*MODELS[script][model], *LENGTH, "--save", folder, *flags)
        with pytest.MonkeyPatch.context() as path:
            if megatron == "release":
                return *train(*flags, script=f"examples/{script}"), folder
            if megatron == "launcher":
                return *train(*flags, script=str(checkout / script)), folder
            path.setenv("PYTHONPATH", str(patched()))
            return *train(*flags, *CPU, script=str(patched() / script), launcher=ALONE), folder

    yield run
    environment.undo()


@pytest.mark.parametrize("megatron", ["launcher", "patch"])
@pytest.mark.parametrize(("script", "model"), [(script, model) for script in MODELS for model in MODELS[script]])
def test_a_script_logs_the_losses_of_the_installed_release(script, model, megatron, run):
    losses, output, _ = run(script, model, megatron)
    layers = 2 if model == "pure" else 1
    heads = ", 1 MTP head (M-)" if model == "heads" else ""
    assert f"HGRN2: {layers} of 2 layers{heads}, expand 32, lower bounds learned" in output
    assert ("load_balancing_loss" in output) == (model == "experts")
    assert sorted(losses) == [1, 2, 3, 4]
    assert losses == run(script, model, "release")[0]


@pytest.mark.parametrize(("saved_by", "megatron"), [("release", "launcher"), ("launcher", "release")])
@pytest.mark.parametrize("script", MODELS)
def test_training_resumes_in_another_megatron(script, saved_by, megatron, run):
    uninterrupted, _, folder = run(script, "experts", saved_by)
    losses, _, _ = run(script, "experts", megatron, "--load", folder, "--ckpt-step", 2)
    # The second line that any run logs is the mean of its first two iterations.
    assert sorted(losses) == [3, 4] and losses[3] == uninterrupted[3]
