"""What CUDA graphs need of the model, as far as a CPU shows it; tests/launcher/test_gpu.py captures them."""

import contextlib
import types

import harness
import pytest
import torch
from megatron.core.full_cuda_graph import StaticBufferLoader
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


@pytest.mark.parametrize("settings", [{}, {"hybrid_layer_pattern": "M-"}], ids=["gpt", "stack"])
def test_the_schedule_is_told_what_graphs_need(settings):
    frees_and_waits = dict(settings, deallocate_pipeline_outputs=True)
    config = build(**frees_and_waits).config
    assert config.deallocate_pipeline_outputs and config.batch_p2p_sync
    config = build(**frees_and_waits, cuda_graph_impl="full_iteration").config
    assert not config.deallocate_pipeline_outputs and not config.batch_p2p_sync


def test_what_a_script_does_to_a_batch_is_not_done_to_the_buffers_of_a_graph(monkeypatch):
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(StaticBufferLoader, "static_buffers", {"training": []})
    load = StaticBufferLoader()
    batches = [{"tokens": torch.full((4,), i), "labels": torch.full((4,), -i)} for i in range(2)]
    first = load(batches[0], "training", 0)
    read_by_the_graph = first["tokens"]
    # one rank's part of the sequence, and what a pipeline stage does not use
    first["tokens"], first["labels"] = first["tokens"][:2], None
    second = load(batches[1], "training", 0)
    assert second["tokens"] is read_by_the_graph
    for name in batches[1]:
        assert torch.equal(second[name], batches[1][name])
