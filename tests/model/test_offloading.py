"""Fine-grained activation offloading: gradients stay as they are, and the mixer's activations leave the device."""

import json

import harness
import pytest

from hgrn2_megatron import UsageError


def assert_equal_and_freed(settings: dict):
    done = harness.python("tests/model/offloaded.py", json.dumps(settings))
    assert done.returncode == 0 and "gradients equal" in done.stdout, done.stdout[-3000:]


@pytest.mark.releases
def test_gradients_are_equal_and_activations_freed():
    assert_equal_and_freed({})


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_the_same_on_a_gpu(implementation, settings):
    pytest.importorskip("transformer_engine.pytorch")
    assert_equal_and_freed(settings | {"transformer_impl": implementation})


@pytest.mark.parametrize(
    "settings", [{"num_layers": 1}, {"hybrid_layer_pattern": "-MM"}], ids=["one-layer", "one-of-the-first-part"]
)
def test_a_stage_that_megatron_would_take_for_finished_is_refused(settings):
    harness.start_megatron()
    modules = ["core_attn", "attn_proj"] + ["mlp_norm"] * ("hybrid_layer_pattern" in settings)
    offload = {"fine_grained_activation_offloading": True, "offload_modules": modules}
    with pytest.raises(UsageError, match="offloads .* first .* two"):
        harness.build_model(**settings, **offload)
