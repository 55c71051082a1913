"""hgrn2_kernels.for_fla: models of fla with and without this package's operator.

`make test` runs these tests with fla 0.6.0 from a folder of its own, because Megatron imports parts of fla wherever it
finds it. Without a GPU, fla's kernels run in Triton's interpreter, which takes its recurrent form and not its chunks.
"""

import copy
import pickle

import pytest
import torch

# it prepares the process for fla, so it comes before fla
pytest.importorskip("fla_models")

import fla
import fla_models
import peft
from fla.layers import HGRN2Attention
from fla.layers import hgrn2 as fla_layer
from fla.models.utils import Cache
from harness import assert_all_close
from operator_cases import relative_error

from hgrn2_kernels import for_fla

DEVICE = fla_models.DEVICE
# Both sides round to fp32 at every token, in another order.
FP32 = 1e-5
# attention in the middle, so that gradients and states pass through it
HYBRID = {"num_hidden_layers": 3, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 5}}
LEFT_PADDED = torch.tensor([[0] * 5 + [1] * 7, [1] * 12], device=DEVICE)


@pytest.fixture(autouse=True)
def fla_as_it_was():
    yield
    assert HGRN2Attention.forward is for_fla.FLA_FORWARD


def tokens(batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, fla_models.VOCAB, (batch, length), generator=generator).to(DEVICE)


def plain(model):
    return model(tokens()).logits


def left_padded(model):
    return model(tokens(), attention_mask=LEFT_PADDED).logits[LEFT_PADDED.bool()]


def packed(model):
    # an empty sequence among them; fla documents the boundaries as int64
    boundaries = torch.tensor([0, 5, 5, 6, 24], device=DEVICE)
    return model(tokens(1, 24), cu_seqlens=boundaries).logits


def from_states(model):
    """Return logits after states through which gradients flow back."""
    part = model(tokens()[:, :5], use_cache=True)
    return model(tokens()[:, 5:], past_key_values=part.past_key_values, use_cache=True).logits


def gradients(model, run) -> dict[str, torch.Tensor]:
    """Return the logits of a run, and the gradients of all parameters for random gradients of the logits."""
    model.zero_grad()
    logits = run(model)
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits))
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters()}


RUNS = {
    "left-padded": (left_padded, {}),
    "convolutions": (left_padded, {"use_short_conv": True, "num_hidden_layers": 1, "use_lower_bound": False}),
    "no-bound-and-wider-values": (plain, {"use_lower_bound": False, "hidden_size": 36, "expand_ratio": 16}),
    "hybrid-left-padded": (left_padded, HYBRID),
    "hybrid-packed": (packed, HYBRID),
    "hybrid-from-states": (from_states, HYBRID),
}


@pytest.mark.parametrize("run, settings", RUNS.values(), ids=RUNS)
def test_logits_and_gradients_and_the_way_back(run, settings):
    model = fla_models.model(**settings)
    before = gradients(model, run)
    for_fla.replace(model)
    assert_all_close(gradients(model, run), before, FP32)
    for_fla.restore(model)
    after = gradients(model, run)
    assert all(torch.equal(after[name], x) for name, x in before.items())


def states(cache) -> dict[str, torch.Tensor]:
    return {str(layer): cache[layer]["recurrent_state"] for layer in range(len(cache))}


def step(model, cache, mask, begin, end):
    return model(tokens()[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True).logits


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_short_conv": True, "num_hidden_layers": 1}],
    ids=["plain", "convolutions"],
)
def test_a_sequence_goes_on_from_the_states_of_the_other_side(settings):
    theirs = fla_models.model(**settings).eval()
    ours = copy.deepcopy(theirs)
    for_fla.replace(ours)
    caches, found, mask = {}, {}, LEFT_PADDED.clone()
    mask[1, 8] = 0
    for name, sides in {"fla": [theirs] * 4, "one": [theirs, ours] * 2, "other": [ours, theirs] * 2}.items():
        cache = Cache()
        # prefill with padding, one token, one that is padding in one row, and several at once
        spans = zip(sides, [(0, 7), (7, 8), (8, 9), (9, 12)], strict=True)
        found[name] = torch.cat([step(model, cache, mask, *span) for model, span in spans], 1)
        caches[name] = cache
    for name in ("one", "other"):
        assert relative_error(found[name][mask.bool()], found["fla"][mask.bool()]) < FP32
        assert_all_close(states(caches[name]), states(caches["fla"]), FP32)
        assert caches[name].get_seq_length() == caches["fla"].get_seq_length() == 12


@torch.no_grad()
def test_decoding_runs_the_step_and_leaves_shared_states_alone(monkeypatch):
    model = fla_models.model().eval()
    for_fla.replace(model)
    cache = model(tokens(), use_cache=True).past_key_values
    shared = states(cache)
    kept = {name: x.clone() for name, x in shared.items()}
    monkeypatch.setattr(for_fla, "chunk_hgrn2", None)
    model(tokens()[:, :1], past_key_values=cache, use_cache=True)
    assert all(torch.equal(x, kept[name]) for name, x in shared.items())
    assert not any(torch.equal(x, kept[name]) for name, x in states(cache).items())


@torch.no_grad()
def generated(model):
    """Return greedy tokens after a left-padded batch. fla's `generate` loses its cache with transformers 5.24."""
    cache, mask, found = Cache(), LEFT_PADDED, [tokens() * LEFT_PADDED]
    for _ in range(8):
        out = model(found[-1], attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(out.logits[:, -1:].argmax(-1))
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    return torch.cat(found, 1)


def test_greedy_generation_of_a_hybrid_with_the_class_replaced():
    model = fla_models.model(**HYBRID).eval()
    expected = generated(model)
    assert len(set(expected[:, 12:].flatten().tolist())) > 3
    for_fla.replace(HGRN2Attention)
    try:
        for_fla.replace(HGRN2Attention)
        for_fla.replace(model)
        for_fla.restore(model)
        assert type(model.model.layers[0].attn) is HGRN2Attention
        assert torch.equal(generated(model), expected)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "use_cache": False}
        alone = model.generate(tokens()[:1, 5:], **options)
        assert torch.equal(alone[0, 7:], expected[0, 12:])
    finally:
        for_fla.restore(HGRN2Attention)
    assert torch.equal(generated(model), expected)


def test_compiled_it_has_the_same_results():
    """Without a GPU, fla's own operator cannot be compiled, because PyTorch traces into Triton's interpreter."""
    model = fla_models.model()
    for_fla.replace(model)
    expected = gradients(model, plain)
    compiled = torch.compile(model, backend="aot_eager")
    assert_all_close(gradients(model, lambda _: plain(compiled)), expected, FP32)


def test_lora_on_every_projection_computes_what_the_merged_weights_give():
    model = fla_models.model(**HYBRID)
    for_fla.replace(model)
    names = ["q_proj", "f_proj", "i_proj", "o_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=4, init_lora_weights=False))
    logits = adapted(input_ids=tokens()).logits
    logits.square().mean().backward()
    assert all(p.grad.any() for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()
    for_fla.restore(merged)
    assert relative_error(logits.detach(), plain(merged).detach()) < FP32


def test_a_replaced_layer_copies_and_pickles():
    layer = HGRN2Attention(hidden_size=32, expand_ratio=16, layer_idx=0).to(DEVICE)
    names = list(layer.state_dict())
    for_fla.replace(layer)
    for_fla.replace(layer)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert isinstance(other, HGRN2Attention) and list(other.state_dict()) == names
        assert type(other).forward is for_fla.forward
        for_fla.restore(other)
        assert type(other) is HGRN2Attention
    assert type(layer).forward is for_fla.forward


def test_unknown_releases_and_signatures_are_refused(monkeypatch):
    model = fla_models.model()

    def refused(message):
        for target in (model, HGRN2Attention):
            with pytest.raises(RuntimeError, match=message):
                for_fla.replace(target)
        assert type(model.model.layers[0].attn) is HGRN2Attention

    with monkeypatch.context() as patch:
        patch.setattr(fla, "__version__", "0.7.0")
        refused("fla is 0.7.0.*knows flash-linear-attention 0.6.0")
    with monkeypatch.context() as patch:
        patch.setattr(fla_layer, "chunk_gla", lambda q, k, v, g, scale: None)
        refused(r"chunk_gla of fla has the parameters \['q', 'k', 'v', 'g', 'scale'\], expected")
    with monkeypatch.context() as patch:
        patch.delattr(fla_layer, "repad_hidden_states")
        refused("fla.layers.hgrn2 has no repad_hidden_states")
    with monkeypatch.context() as patch:
        original = for_fla.FLA_FORWARD

        def traced(
            self, hidden_states, attention_mask, past_key_values, use_cache, output_attentions, lower_bound, **kwargs
        ):
            return original(self, hidden_states)

        patch.setattr(HGRN2Attention, "forward", traced)
        refused("not fla's own: something else has replaced it")


def test_unknown_layers_are_refused_before_any_is_changed():
    class Other(HGRN2Attention):
        pass

    model = fla_models.model()
    first, last = (layer.attn for layer in model.model.layers)
    last.__class__ = Other
    with pytest.raises(RuntimeError, match="Other derives from HGRN2Attention"):
        for_fla.replace(model)
    last.__class__ = HGRN2Attention
    last.forward = last.forward
    with pytest.raises(RuntimeError, match="forward of layer 1 has been replaced"):
        for_fla.replace(model)
    assert type(first) is HGRN2Attention


def test_wrong_targets_are_refused():
    model = fla_models.model()
    with pytest.raises(ValueError, match="no layer of this model was replaced"):
        for_fla.restore(model)
    with pytest.raises(ValueError, match="HGRN2Attention was not replaced"):
        for_fla.restore(HGRN2Attention)
    for change in (for_fla.replace, for_fla.restore):
        with pytest.raises(ValueError, match="Linear has no HGRN2Attention"):
            change(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match="got 'hgrn2'"):
            change("hgrn2")
    for_fla.replace(model)
    with pytest.raises(ValueError, match=r"must be \[batch, tokens\].*got \[2, 1, 12, 12\]"):
        model(tokens(), attention_mask=torch.ones(2, 1, 12, 12, device=DEVICE))


# fla's model as it is trained: chunks, fused norms, SwiGLU and cross-entropy
LARGE = {"hidden_size": 512, "num_hidden_layers": 4, "expand_ratio": 128, "vocab_size": 1000, "attn_mode": "chunk"} | {
    "fuse_norm": True,
    "fuse_swiglu": True,
    "fuse_cross_entropy": True,
}


def long_padded(model):
    mask = torch.ones(2, 500, dtype=torch.long, device=DEVICE)
    mask[0, :130] = 0
    return model(tokens(2, 500), attention_mask=mask).logits[mask.bool()]


@pytest.mark.gpu
def test_gpu_fp32_beside_fla_token_by_token():
    """fla multiplies chunks in TF32, so its recurrent form is the one to compare fp32 with."""
    model = fla_models.model(**LARGE | {"attn_mode": "fused_recurrent"})
    expected = gradients(model, long_padded)
    for_fla.replace(model)
    assert_all_close(gradients(model, long_padded), expected, 1e-4)


@pytest.mark.gpu
def test_gpu_bf16_is_as_near_to_fp32_as_fla():
    exact = gradients(fla_models.model(**LARGE | {"attn_mode": "fused_recurrent"}), long_padded)
    model = fla_models.model(**LARGE).bfloat16()
    theirs, logits = gradients(model, long_padded), long_padded(model)
    for_fla.replace(model)
    ours = gradients(model, long_padded)
    far = {}
    for name, want in exact.items():
        errors = relative_error(ours[name], want), relative_error(theirs[name], want)
        if not errors[0] <= 1.5 * errors[1]:
            far[name] = errors
    assert not far, far
    for_fla.restore(model)
    assert torch.equal(long_padded(model), logits)


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_greedy_generation_and_states():
    model = fla_models.model(**LARGE | {"attn_mode": "fused_recurrent"}).eval()
    mask = torch.ones(2, 200, dtype=torch.long, device=DEVICE)
    mask[0, :77] = 0
    prompt = tokens(2, 200) * mask
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 64}
    expected = model.generate(prompt, attention_mask=mask, **options)
    cache = model(prompt, attention_mask=mask, use_cache=True).past_key_values
    for_fla.replace(model)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **options), expected)
    ours = model(prompt, attention_mask=mask, use_cache=True).past_key_values
    assert_all_close(states(ours), states(cache), 1e-4)


@pytest.mark.gpu
def test_gpu_training_losses():
    """100 iterations on the same tokens, in bf16 under autocast, with fp32 weights."""

    def train(replaced):
        model = fla_models.model(**LARGE)
        if replaced:
            for_fla.replace(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator = torch.Generator().manual_seed(3)
        losses = []
        for _ in range(100):
            batch = torch.randint(1, 50, (4, 256), generator=generator).to(DEVICE)
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    theirs, ours = train(False), train(True)
    assert theirs[-10:].mean() < theirs[:10].mean()
    assert (ours - theirs).abs().max() < 0.02 * theirs.mean()
