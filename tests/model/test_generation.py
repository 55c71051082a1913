"""Generation from states and caches of a static context: token by token, the logits of the whole sequence."""

import harness
import pytest
import torch
from megatron.core.inference.contexts import StaticInferenceContext

LENGTH, PROMPTS = 532, (3, 9, 20)
MODELS = {
    "hgrn2": {},
    "hybrid": {"hgrn2_layer_pattern": "H*H"},
    "no-bounds": {"hgrn2_lower_bounds": "none"},
    "stack": {"hybrid_layer_pattern": "M-*-M-"},
}


def forward(model, tokens, positions, context=None):
    s = tokens.shape[1]
    # Megatron makes this mask itself, on the device named cuda
    mask = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None] if s > 1 else None
    return model(tokens, positions, mask, inference_context=context, runtime_gather_output=True)


def positions(tokens, start=0):
    return torch.arange(start, start + tokens.shape[1]).expand_as(tokens)


def greedy(model, prompts, context, length) -> torch.Tensor:
    """Tokens [b, length] as Megatron's static engine makes them: as far as the shortest prompt, then one at a time."""
    tokens = torch.zeros(len(prompts), length, dtype=torch.long)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    start, end = 0, int(lengths.min())
    while end < length:
        piece = tokens[:, start:end]
        logits = forward(model, piece, positions(piece, start), context)
        context.sequence_len_offset = end
        drawn = logits[:, -1].argmax(-1)
        tokens[:, end] = torch.where(lengths <= end, drawn, tokens[:, end])
        start, end = end, end + 1
    return tokens


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    harness.start_megatron()
    model = harness.build_model(num_layers=3, **MODELS[request.param])
    model.load_state_dict(harness.full_weights(model), strict=False)
    return model.eval()


@torch.no_grad()
def test_greedy_tokens_are_those_of_the_whole_sequence(model):
    torch.manual_seed(0)
    prompts = [torch.randint(harness.VOCAB, (length,)) for length in PROMPTS]
    context = StaticInferenceContext(len(prompts), LENGTH)
    # the second time in a context that has been used
    for length in (LENGTH, 60):
        tokens = greedy(model, prompts, context, length)
        logits = forward(model, tokens, positions(tokens))
        for row, likeliest, prompt in zip(tokens, logits.argmax(-1), prompts, strict=True):
            assert torch.equal(row[: len(prompt)], prompt)
            assert torch.equal(row[len(prompt) :], likeliest[len(prompt) - 1 : -1])
        context.reset()
        prompts = [prompt.flip(0) for prompt in prompts]


def test_engines_that_are_not_built_are_refused():
    harness.start_megatron()
    model = harness.build_model()
    dynamic = StaticInferenceContext(1, LENGTH)
    dynamic.is_static_batching = lambda: False
    mixer = model.decoder.layers[0].self_attention
    with pytest.raises(ValueError, match="legacy=True"):
        mixer(torch.zeros(4, 1, 64), inference_context=dynamic)
    with pytest.raises(ValueError, match="unpacked sequences"):
        params = harness.packed_seq_params([4])
        mixer(torch.zeros(4, 1, 64), inference_context=StaticInferenceContext(1, LENGTH), packed_seq_params=params)
