"""Checkpoints of ranks that hold the same tensor more than once: saved, loaded into a new model, and trained on.

A rank holds a replica of the lower bounds for each of its virtual pipeline stages.
"""

import itertools
import json

import harness
import pytest
import torch

MODELS = {
    "gpt": {},
    "hybrid": {"hgrn2_layer_pattern": "**HH"},
    "tied": {"tied": True},
    "stack": {"hybrid_layer_pattern": "M-M-M-M-"},
}
SEGMENTS = {"config": {"hybrid_layer_pattern": "M-|M-|M-|M-"}}
VPP2 = {"pp": 2, "vpp": 2}
# the others of the four ranks are data parallel
LAYOUTS = {"dp2": VPP2, "cp2": VPP2 | {"cp": 2}}
# how Megatron saves the state of its distributed optimizer, or no distributed optimizer
OPTIMIZERS = ["plain", "dp_reshardable", "fully_reshardable"]
# whether the ranks divide the work: of saving, of loading
WORK = {
    "alone": (False, False),
    "saved-together": (True, False),
    "loaded-together": (False, True),
    "both": (True, True),
}

CASES = list(itertools.product(["gpt", "stack"], LAYOUTS, ["plain"], WORK))
CASES += list(itertools.product(["gpt", "stack"], ["dp2"], OPTIMIZERS[1:], ["both"]))
CASES += [("gpt", "cp2", "fully_reshardable", work) for work in WORK]
CASES += list(itertools.product(["hybrid", "tied"], ["dp2"], OPTIMIZERS[:2], ["both"]))

# those that also run against the older release of megatron-core
ON_RELEASES = [("gpt", "dp2", optimizer, "both") for optimizer in ("plain", "fully_reshardable")]
PARAMETERS = [pytest.param(*case, marks=pytest.mark.releases if case in ON_RELEASES else ()) for case in CASES]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    """Run the selected cases, one after another, and return what the ranks printed and the folder of their files."""
    params = [item.callspec.params for item in request.session.items if item.path == request.path]
    folder = tmp_path_factory.mktemp("saving")
    harness.start_megatron()
    for name, model in MODELS.items():
        torch.save(harness.full_weights(harness.build_model(num_layers=4, **model)), folder / f"{name}.weights")
    runs = {}
    for model, layout, optimizer, work in (p.values() for p in params):
        save, load = WORK[work]
        runs["-".join((model, layout, optimizer, work))] = {
            "model": MODELS[model] | {"num_layers": 4},
            "layout": LAYOUTS[layout]
            | {"distributed_optimizer": optimizer != "plain"}
            | (SEGMENTS if model == "stack" else {}),
            "weights": f"{model}.weights",
            "sharding": optimizer,
            "save": save,
            "load": load,
        }
    worker = harness.ROOT / "tests" / "parallel" / "saving_worker.py"
    return harness.torchrun(4, str(worker), str(folder), json.dumps(runs)).stdout, folder


@pytest.mark.parametrize(("model", "layout", "optimizer", "work"), PARAMETERS)
def test_a_checkpoint_brings_everything_back(model, layout, optimizer, work, results):
    output, folder = results
    assert (folder / f"{model}-{layout}-{optimizer}-{work}.done").exists(), output[-6000:]
