"""What CUDA graphs need of the model, as far as a CPU shows it; tests/launcher/test_gpu.py captures them."""

import harness
import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.transformer_layer import TransformerLayer

pytestmark = pytest.mark.releases


def build(**settings):
    harness.start_megatron()
    model = harness.build_model(**settings)
    model.load_state_dict(harness.full_weights(model), strict=False)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    tokens, labels = harness.batch()
    logits = model(tokens, None, None)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"num_layers": 3}, {"hybrid_layer_pattern": "M-M-"}], ids=["gpt", "stack"])
def test_the_bound_of_a_layer_is_an_input_of_its_graph(settings, monkeypatch):
    model = build(**settings)
    expected = gradients(model)
    given = []

    def graph(layer, *args, **kwargs):
        """A graph's backward knows its inputs alone: the bound as a leaf, whose gradient is handed on."""
        bound = kwargs.get("attention_bias")
        if bound is not None:
            kwargs["attention_bias"] = inner = bound.detach().requires_grad_()
            inner.register_hook(lambda gradient: given.append((bound, gradient)))
        return torch.nn.Module.__call__(layer, *args, **kwargs)

    monkeypatch.setattr(TransformerLayer, "__call__", graph)
    # a model built so would ask for a GPU
    model.config.cuda_graph_impl = "local"
    actual = gradients(model)
    assert len(given) == sum(hasattr(layer.self_attention, "lower_bound") for layer in model.decoder.layers)
    name, bounds = "decoder.hgrn2_bounds.weight", model.decoder.hgrn2_bounds.weight
    # it is reached through the inputs alone
    assert name not in actual
    torch.autograd.backward(*zip(*given, strict=True))
    actual[name] = bounds.grad
    harness.assert_all_close(actual, expected, tolerance=1e-6)


def test_megatrons_graphs_of_a_static_step_are_refused():
    model = build()
    model.config.cuda_graph_impl = "local"
    mixer = model.decoder.layers[0].self_attention
    with pytest.raises(ValueError, match="advance the states .* dynamic engine"):
        mixer(torch.zeros(4, 1, 64), inference_context=StaticInferenceContext(1, 8))
