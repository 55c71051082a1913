"""The model Megatron builds is HGRN2: logits and every gradient equal those of an independent implementation."""

import harness
import plain_hgrn2
import pytest
import torch

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron import mixer

pytestmark = pytest.mark.releases

LAYERS, HEAD_DIM = 3, 16


@pytest.fixture(scope="module")
def results():
    """(ours, theirs): logits and gradients by published name."""
    harness.start_megatron()
    model = harness.build_model(num_layers=LAYERS)
    model.load_state_dict(harness.full_weights(model), strict=False)
    tokens, labels = harness.batch()

    ours_logits = model(tokens, None, None)
    loss = torch.nn.functional.cross_entropy(ours_logits.flatten(0, 1), labels.flatten())
    loss.backward()
    ours = plain_hgrn2.from_megatron({n: p.grad for n, p in model.named_parameters()}, LAYERS, HEAD_DIM)

    weights = {n: p.detach().double() for n, p in model.named_parameters()}
    weights = plain_hgrn2.from_megatron(weights, LAYERS, HEAD_DIM)
    weights = {n: w.clone().requires_grad_() for n, w in weights.items()}
    theirs_logits = plain_hgrn2.logits(weights, tokens, LAYERS, HEAD_DIM)
    torch.nn.functional.cross_entropy(theirs_logits.flatten(0, 1), labels.flatten()).backward()
    theirs = {n: w.grad for n, w in weights.items()}
    return ours | {"logits": ours_logits}, theirs | {"logits": theirs_logits}


def test_logits_and_every_gradient(results):
    harness.assert_all_close(*results, tolerance=1e-5)


@pytest.mark.parametrize(("flags", "runs"), [({}, 1), ({"recompute_granularity": "selective"}, 2)], ids=str)
def test_selective_recompute_runs_the_mixers_own_part_again(flags, runs, monkeypatch):
    harness.start_megatron()
    model = harness.build_model(num_layers=LAYERS, **flags)
    calls = []

    def count(*args, **options):
        calls.append(options["save_states"])
        return chunk_hgrn2_fused(*args, **options)

    def checkpoint(function, distribute, *args):
        # Megatron's asks for the state of a GPU's generator; tests/parallel runs that one
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    monkeypatch.setattr(mixer, "chunk_hgrn2_fused", count)
    monkeypatch.setattr(mixer.tensor_parallel, "checkpoint", checkpoint)
    model(harness.batch()[0], None, None).sum().backward()
    assert calls == [True] * runs * LAYERS
