"""Packed sequences: each is what it would be alone, in a GPT and in a HybridModel."""

import types

import harness
import pytest
import torch

pytestmark = pytest.mark.releases

LENGTHS = [1, 17, 70, 12]


def gradients(model, losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(loss.sum() for loss in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(scope="module", params=[{}, {"hybrid_layer_pattern": "M-M-M-"}], ids=["gpt", "hybrid-model"])
def alone(request):
    """A model, documents, and for each of these its losses alone; with the gradients of all."""
    harness.start_megatron()
    model = harness.build_model(**request.param)
    model.load_state_dict(harness.full_weights(model), strict=False)
    generator = torch.Generator().manual_seed(3)
    documents = [torch.randint(harness.VOCAB, (1, n + 1), generator=generator) for n in LENGTHS]
    losses = [model(x[:, :-1], None, None, labels=x[:, 1:].contiguous()) for x in documents]
    return model, documents, [x.detach() for x in losses], gradients(model, losses)


@pytest.mark.parametrize(
    ("padded", "behind"), [(None, 0), ([4, 20, 70, 64], 0), (None, 9)], ids=["dense", "padded", "more-behind"]
)
def test_each_document_is_what_it_is_alone(alone, padded, behind):
    model, documents, want, want_gradients = alone
    sizes = padded or LENGTHS
    total = sum(sizes) + behind
    tokens, labels = (torch.full((1, total), 5) for _ in range(2))
    places, start = [], 0
    for document, size in zip(documents, sizes, strict=True):
        places.append(slice(start, start + document.shape[1] - 1))
        tokens[:, places[-1]], labels[:, places[-1]] = document[:, :-1], document[:, 1:]
        start += size
    losses = model(tokens, None, None, labels=labels, packed_seq_params=harness.packed_seq_params(LENGTHS, padded))
    got = [losses[:, place] for place in places]
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    # what padding loses is masked
    harness.assert_all_close(gradients(model, got), want_gradients, tolerance=1e-5)


@pytest.mark.parametrize(
    ("change", "batch", "message"),
    [
        ({"qkv_format": "bshd"}, 1, "got bshd of 1 sequences with a batch of 1"),
        ({"qkv_format": "sbhd"}, 2, "got sbhd of 1 sequences with a batch of 2"),
        ({}, 2, "got thd of 1 sequences with a batch of 2"),
        ({"cu_seqlens_q": None}, 2, "got thd of no sequences with a batch of 2"),
        ({"cu_seqlens_q": None}, 1, "has no boundaries, cu_seqlens_q is None"),
        ({"cp_group": types.SimpleNamespace(size=lambda: 2)}, 1, "does not say how 2 context-parallel ranks split"),
        ({"local_cp_size": 2}, 1, "has local_cp_size 2, but its cp_group, or without one the model's, has 1 ranks"),
    ],
)
def test_other_packings_are_refused(change, batch, message):
    harness.start_megatron()
    params = harness.packed_seq_params([harness.SEQ])
    for name, value in change.items():
        setattr(params, name, value)
    tokens, _ = harness.batch(size=batch)
    with pytest.raises(ValueError, match=message):
        harness.build_model()(tokens, None, None, packed_seq_params=params)


@pytest.mark.parametrize("borders", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_an_unpacked_batch_may_come_with_parameters_of_the_format_sbhd(batch, borders):
    harness.start_megatron()
    model = harness.build_model()
    tokens, _ = harness.batch(size=batch)
    # as Megatron's multimodal models give them: a sequence a row, without the padding behind it
    params = harness.packed_seq_params(batch * [harness.SEQ - 3])
    params.qkv_format = "sbhd"
    if not borders:
        params.cu_seqlens_q = params.cu_seqlens_kv = None
    assert torch.equal(model(tokens, None, None, packed_seq_params=params), model(tokens, None, None))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("inside", [True, False], ids=["borders-inside", "borders-outside"])
def test_without_gradients_the_losses_are_the_same(alone, mode, inside):
    model, documents, want, _ = alone
    tokens, labels = (torch.cat([x[:, own] for x in documents], 1) for own in (slice(None, -1), slice(1, None)))
    params = None if inside else harness.packed_seq_params(LENGTHS)
    with mode():
        params = params or harness.packed_seq_params(LENGTHS)
        losses = model(tokens, None, None, labels=labels, packed_seq_params=params)
        whole = model(documents[-1][:, :-1], None, None, labels=documents[-1][:, 1:].contiguous())
    torch.testing.assert_close(losses, torch.cat(want, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole, want[-1], rtol=0, atol=0)
    # and training goes on from there
    if mode is torch.no_grad or not inside:
        model(tokens, None, None, labels=labels, packed_seq_params=params).sum().backward()
