"""Every layout trains the same model: loss and every parameter's gradient of real Megatron ranks over gloo."""

import functools
import json

import harness
import pytest
import torch

LAYOUTS = {
    "tp2": (2, {"tp": 2}),
    "tp2-sequence-parallel": (2, {"tp": 2, "sequence_parallel": True}),
    "dp2": (2, {}),
}
EXPERTS = {"num_moe_experts": 4, "moe_layer_freq": [0, 1, 1], "moe_router_load_balancing_type": "none"}
MODELS = {
    "hgrn2": {},
    "hybrid": {"hgrn2_layer_pattern": "HH*"},
    "experts": EXPERTS | {"moe_token_dispatcher_type": "allgather"},
}
CASES = [("hgrn2", layout) for layout in LAYOUTS]
CASES += [("hybrid", "tp2-sequence-parallel"), ("experts", "dp2")]


@functools.cache
def weights(model: str) -> dict[str, torch.Tensor]:
    harness.start_megatron()
    return harness.full_weights(harness.build_model(**MODELS[model]))


def run(folder, model: str, num_processes: int, layout: dict) -> dict[str, torch.Tensor]:
    out = folder / f"{model}-{num_processes}-{'-'.join(layout)}"
    torch.save(weights(model), f"{out}.weights")
    worker = harness.ROOT / "tests" / "parallel" / "worker.py"
    done = harness.torchrun(num_processes, str(worker), str(out), json.dumps(layout | MODELS[model]))
    assert done.returncode == 0, done.stdout[-3000:]
    return torch.load(out)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return functools.cache(lambda model: run(tmp_path_factory.mktemp("one"), model, 1, {}))


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_layout_equals_one_process(model, layout, one_process, tmp_path):
    harness.assert_all_close(run(tmp_path, model, *LAYOUTS[layout]), one_process(model), tolerance=1e-5)
