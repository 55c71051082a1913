"""Generation from states and caches: a static context's, and one step of dynamic batching."""

import dataclasses
import types
from contextlib import nullcontext

import harness
import pytest
import torch
from megatron.core.inference.batch_dimensions_utils import InferenceBatchDimensions
from megatron.core.inference.config import InferenceConfig, MambaInferenceStateConfig
from megatron.core.inference.contexts import DynamicInferenceContext, StaticInferenceContext
from megatron.core.inference.contexts.attention_context.mamba_metadata import MambaMetadata

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron import generation
from hgrn2_megatron.generation import advance, advance_dynamic

LENGTH, PROMPTS = 532, (3, 9, 20)
MODELS = {
    "hgrn2": {},
    "hybrid": {"hgrn2_layer_pattern": "H*H"},
    "no-bounds": {"hgrn2_lower_bounds": "none"},
    "stack": {"hybrid_layer_pattern": "M-*-M-"},
    "latent": {"hybrid_layer_pattern": "M-+-M-"} | harness.LATENT,
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


def test_inference_mode_generates_as_no_grad_does(model):
    torch.manual_seed(1)
    prompts = [torch.randint(harness.VOCAB, (length,)) for length in PROMPTS]
    tokens = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            tokens.append(greedy(model, prompts, StaticInferenceContext(len(prompts), LENGTH), 40))
    assert torch.equal(*tokens)


H, K, SLOTS, WIDTH = 2, 4, 6, 20


@pytest.mark.parametrize("modes", [[torch.no_grad] * 3, [torch.inference_mode, torch.no_grad, torch.inference_mode]])
def test_batches_take_turns_in_one_context(modes):
    """Megatron gives the first two of five sequences and then the others; prompts come in pieces."""
    generator = torch.Generator().manual_seed(5)
    qfv = torch.randn(5, 17, H, 3, K, generator=generator)
    bound = torch.rand(H, K, generator=generator)
    want, _ = chunk_hgrn2_fused(qfv, bound)
    context = StaticInferenceContext(5, 17)
    # the second time in a context that has been used
    for _ in range(2):
        outputs = torch.zeros_like(want)
        for mode, start, end in zip(modes + modes[:1], (0, 6, 7, 12), (6, 7, 12, 17), strict=True):
            context.sequence_len_offset = start
            for first, rows in ((0, slice(0, 2)), (2, slice(2, 5))):
                context.batch_size_offset = first
                with mode():
                    outputs[rows, start:end] = advance(qfv[rows, start:end], bound, context, 1)
        torch.testing.assert_close(outputs, want)
        context.reset()


def test_states_are_fp32_and_go_where_megatron_puts_their_sequences():
    qfv = torch.randn(3, 9, H, 3, K, generator=torch.Generator().manual_seed(6)).bfloat16()
    order = torch.tensor([2, 0, 1])
    context = StaticInferenceContext(3, 9)
    advance(qfv[:, :5], None, context, 1)
    context.swap_key_value_dict(order)
    context.sequence_len_offset = 5
    states = context.key_value_memory_dict[1][0]
    assert states.dtype == torch.float32
    o = advance(qfv[order, 5:], None, context, 1)
    torch.testing.assert_close(o, chunk_hgrn2_fused(qfv, None)[0][order, 5:])


def test_layouts_that_are_not_built_are_refused():
    harness.start_megatron()
    mixer = harness.build_model().decoder.layers[0].self_attention
    with pytest.raises(ValueError, match="unpacked sequences"):
        params = harness.packed_seq_params([4])
        mixer(torch.zeros(4, 1, 64), inference_context=StaticInferenceContext(1, LENGTH), packed_seq_params=params)
    # one process has nothing to gather
    mixer.config.sequence_parallel = True
    with pytest.raises(ValueError, match="drop --sequence-parallel, or use Megatron's dynamic engine"):
        mixer(torch.zeros(4, 1, 64), inference_context=StaticInferenceContext(1, LENGTH))


LENGTHS = [1, 1, 7, 3]


def dynamic_context(decodes: int, prefills: int, lengths=LENGTHS, **settings):
    """What a layer sees of a DynamicInferenceContext in a step of WIDTH tokens, with Megatron's own metadata.

    The first two of `lengths` are requests that decode, the others prompts. CUDA graphs pad to `decodes` and `prefills`
    requests.
    """
    # Megatron's metadata are placed by this name
    torch.cuda.current_device = lambda: "cpu"
    real = InferenceBatchDimensions(token_count=sum(lengths), prefill_req_count=len(lengths) - 2, decode_req_count=2)
    padded = InferenceBatchDimensions(token_count=WIDTH, prefill_req_count=prefills, decode_req_count=decodes)
    metadata = MambaMetadata(SLOTS, WIDTH, max_intermediate_count=1, d_conv=1)
    slots = torch.tensor([4, 0, 2, 5])[: len(lengths)].int()
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    requests = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()
    metadata.update(slots, requests, borders, real, padded, enable_chunked_prefill=False)
    states = torch.randn(SLOTS, H, K, K, generator=torch.Generator().manual_seed(3))
    fields = dict(
        padded_batch_dimensions=padded,
        mamba_metadata=metadata,
        mamba_states_cache=lambda layer_number: (None, states),
        mamba_slot_allocator=None,
        num_speculative_tokens=0,
        is_hybrid_model=True,
    )
    return types.SimpleNamespace(**fields | settings), states, slots.tolist()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("decodes", "prefills"), [(2, 2), (2, 4), (4, 2), (5, 3)])
def test_a_step_with_the_padding_of_a_cuda_graph(decodes, prefills, mode):
    generator = torch.Generator().manual_seed(4)
    qfv = torch.randn(1, WIDTH, H, 3, K, generator=generator)
    qfv[:, sum(LENGTHS) :] = torch.nan
    bound = torch.rand(H, K, generator=generator)
    context, states, slots = dynamic_context(decodes, prefills)
    before, start = states.clone(), 0
    with mode():
        o = advance_dynamic(qfv, bound, context, 1)
    assert o.shape == (1, WIDTH, H, K)
    assert WIDTH > sum(LENGTHS) and not o[:, sum(LENGTHS) :].any()
    for slot, length in zip(slots, LENGTHS, strict=True):
        own = slice(start, start := start + length)
        expected, final = chunk_hgrn2_fused(
            qfv[:, own], bound, initial_state=before[slot : slot + 1], output_final_state=True
        )
        torch.testing.assert_close(o[:, own], expected)
        torch.testing.assert_close(states[slot], final[0])
    others = sorted(set(range(SLOTS)) - set(slots))
    assert torch.equal(states[others], before[others])


def test_a_step_of_padding_alone_leaves_the_states():
    # a request that decodes, and a graph for prompts
    context, states, slots = dynamic_context(2, 2, lengths=[1, 1])
    before = states.clone()
    advance_dynamic(torch.randn(1, WIDTH, H, 3, K), None, context, 1)
    others = sorted(set(range(SLOTS)) - set(slots))
    assert torch.equal(states[others], before[others])


def test_the_states_inside_of_prompts():
    """Two empty sequences, a prompt with three positions, one without, one with one, and a row of padding."""
    generator = torch.Generator().manual_seed(7)
    qfv = torch.randn(1, WIDTH + 3, H, 3, K, generator=generator)
    qfv[:, WIDTH:] = torch.nan
    bound = torch.rand(H, K, generator=generator)
    boundaries = torch.tensor([0, 0, 2, 2, 11, 13, WIDTH]).int()
    initial = torch.randn(6, H, K, K, generator=generator)
    positions = torch.tensor([3, 7, 10, 16, WIDTH]).int()
    states = generation._states_inside(qfv, bound, boundaries, initial, positions)
    for state, position, sequence in zip(states, positions[:4], (3, 3, 3, 5), strict=False):
        prompt = qfv[:, boundaries[sequence] : position]
        entering = initial[sequence : sequence + 1]
        _, want = chunk_hgrn2_fused(prompt, bound, initial_state=entering, output_final_state=True)
        torch.testing.assert_close(state, want[0])


def test_the_states_after_each_speculative_token():
    generator = torch.Generator().manual_seed(8)
    qfv, states = (torch.randn(*shape, generator=generator) for shape in ((3, 4, H, 3, K), (SLOTS, H, K, K)))
    before, slots = states.clone(), torch.tensor([4, 0, -1])
    after_each = torch.zeros(SLOTS, 4, H, K, K)
    o = generation._decode(qfv, None, states, slots, after_each)
    assert not o[2].any() and not after_each[[1, 2, 3, 5]].any()
    for i, slot in enumerate((4, 0)):
        entering = before[slot : slot + 1]
        for end in range(1, 5):
            want, final = chunk_hgrn2_fused(qfv[i : i + 1, :end], None, initial_state=entering, output_final_state=True)
            torch.testing.assert_close(after_each[slot, end - 1], final[0])
        torch.testing.assert_close(o[i : i + 1], want)
        torch.testing.assert_close(states[slot], final[0])


@torch.no_grad()
def test_a_head_drafts_for_each_request_alone():
    harness.start_megatron()
    model = harness.build_model(hybrid_layer_pattern="M-/M-").eval()
    hidden = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(9))
    tokens, places = torch.tensor([[5, 6, 7]]), torch.tensor([[4, 9, 2]])
    together = model.compute_mtp_single_step(hidden, tokens, places, 0)
    for i in range(3):
        own = slice(i, i + 1)
        alone = model.compute_mtp_single_step(hidden[own], tokens[:, own], places[:, own], 0)
        for found, want in zip(together, alone, strict=True):
            torch.testing.assert_close(found[own], want)


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"is_hybrid_model": False}, "mamba_inference_state_config="),
        ({"mamba_states_cache": lambda layer: (None, torch.zeros(SLOTS, H, K, K).bfloat16())}, "ssm-states-dtype fp32"),
    ],
)
def test_contexts_of_no_use_are_refused(settings, instead):
    context, _, _ = dynamic_context(2, 2, **settings)
    with pytest.raises(ValueError, match=instead):
        advance_dynamic(torch.zeros(1, WIDTH, H, 3, K), None, context, 1)


def test_what_megatron_learns_of_a_models_states():
    harness.start_megatron()
    for settings, layers in [({}, "MMM*"), ({"hybrid_layer_pattern": "M-M-"}, "M-M-*")]:
        model = harness.build_model(**settings, params_dtype=torch.bfloat16)
        found = MambaInferenceStateConfig.from_model(model)
        assert "".join(found.layer_type_list) == layers
        assert found.ssm_states_shape == (4, 16, 16) and found.ssm_states_dtype == torch.float32
        with pytest.raises(ValueError, match="ssm-states-dtype fp32"):
            MambaInferenceStateConfig.from_model(model, ssm_states_dtype=torch.bfloat16)


def test_a_stage_of_attention_alone_has_states_too():
    harness.start_megatron()
    block = harness.build_model().decoder
    layers = [types.SimpleNamespace(self_attention=None)] * 2
    stage = types.SimpleNamespace(config=block.config, pg_collection=block.pg_collection, layers=layers)
    assert generation.HGRN2StateConfig.of_stack(stage, None).layer_type_list == ["*", "*", "M"]


def test_dynamic_batching_beside_multi_latent_attention_is_refused():
    harness.start_megatron()
    model = harness.build_model(hybrid_layer_pattern="M-+-", **harness.LATENT)
    with pytest.raises(ValueError, match=r"with \+ in --hybrid-layer-pattern .* legacy=True"):
        MambaInferenceStateConfig.from_model(model)


def test_dynamic_batching_of_attention_needs_flash_attention(monkeypatch):
    harness.start_megatron()
    model = harness.build_model(hgrn2_layer_pattern="H*")
    states = MambaInferenceStateConfig.from_model(model)
    assert states.layer_type_list == ["M", "*", "M"]
    monkeypatch.setattr(generation, "_has_flash_attention", lambda: False)
    with pytest.raises(ValueError, match="flash-attn"):
        settings = InferenceConfig(max_sequence_length=8, mamba_inference_state_config=states)
        DynamicInferenceContext(model_config=model.config, inference_config=settings)
    monkeypatch.setattr(generation, "_has_flash_attention", lambda: True)
    states.check(InferenceConfig())


def test_speculative_decoding_on_a_cpu_needs_tritons_interpreter(monkeypatch):
    harness.start_megatron()
    states = MambaInferenceStateConfig.from_model(harness.build_model())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    states.check(InferenceConfig(num_speculative_tokens=2))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="num_speculative_tokens is 2, .* TRITON_INTERPRET=1"):
        states.check(InferenceConfig(num_speculative_tokens=2))


@pytest.mark.parametrize(
    ("release", "uneven", "instead"),
    [((0, 18), False, "install megatron-core 0.19"), ((0, 19), True, "equal numbers of HGRN2 layers")],
)
def test_prefix_caches_that_would_be_wrong_are_refused(release, uneven, instead, monkeypatch):
    harness.start_megatron()
    states = MambaInferenceStateConfig.from_model(harness.build_model())
    states = dataclasses.replace(states, is_uneven=uneven)
    monkeypatch.setattr(generation, "megatron_release", lambda: release)
    states.check(InferenceConfig())
    with pytest.raises(ValueError, match=f"enable_prefix_caching .* {instead}"):
        states.check(InferenceConfig(enable_prefix_caching=True))
    monkeypatch.setattr(generation, "megatron_release", lambda: (0, 20))
    states.check(InferenceConfig(enable_prefix_caching=True))


@pytest.mark.parametrize(("impl", "refused"), [("local", True), ("none", False)])
def test_no_graph_is_captured_with_a_prefix_cache(impl, refused):
    harness.start_megatron()
    model = harness.build_model()
    # Megatron builds no model with graphs without a GPU.
    model.config.cuda_graph_impl = impl
    states = MambaInferenceStateConfig.from_model(model)
    states.check(InferenceConfig())
    with pytest.raises(ValueError, match="--cuda-graph-impl none") if refused else nullcontext():
        states.check(InferenceConfig(enable_prefix_caching=True))
