"""Tokens behind the last border of packed sequences: they may hold anything, and give and get nothing."""

import itertools

import pytest
import torch
from operator_cases import hand_on, make_inputs, relative_error

from hgrn2_kernels import (
    Pieces,
    chunk_hgrn2,
    chunk_hgrn2_fused,
    chunk_hgrn2_pytorch,
    chunk_hgrn2_sharded,
    chunk_plan,
    dispatch,
    op,
    recurrent_hgrn2,
    shard_states,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# tokens in all, borders: a few more tokens, as many chunks as can be, no sequence with a token, and nothing behind
CASES = [(40, [0, 7, 7, 39]), (100, [0, 1, 34]), (99, [0, 1, 34]), (70, [0, 0, 0]), (40, [0, 9, 40])]


@pytest.fixture(params=["pytorch", "triton", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("bf16", "hopper"))])
def heads(request, monkeypatch):
    """The heads of the inputs, for each form of the operators. Memory holds NaN before it is written."""
    form = request.param
    monkeypatch.setattr(dispatch, "IN_USE", form == "hopper")
    monkeypatch.setattr(op, "implementation", lambda *where: "pytorch" if form == "pytorch" else "triton")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # a Hopper GPU has kernels of its own for heads of 128
    yield dict(dtype=torch.bfloat16 if form in ("bf16", "hopper") else torch.float32, K=128 if form == "hopper" else 16)
    torch.use_deterministic_algorithms(False)


def run(program, inputs, weights, end):
    """Outputs of the program and gradients, of tokens up to `end` alone, those of [1, T, ..] filled up with zeros."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    T = max(x.shape[1] for x in inputs if x.dim() > 3)
    outputs = program(*(x[:, :end] if is_tokens(x, T) else x for x in leaves))
    weights = [w[:, :end] if is_tokens(w, T) else w for w in weights]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, leaves, weights)]


def is_tokens(x, T):
    return x.shape[0] == 1 and x.shape[1] == T


def check(program, inputs, weights, T, end):
    """The program over all T tokens, of which those behind `end` hold NaN, against that over the others alone."""
    want = run(program, inputs, weights, end)
    for x in (*inputs, *weights):
        if is_tokens(x, T):
            x[:, end:] = torch.nan
    for got, alone in zip(run(program, inputs, weights, T), want, strict=True):
        if is_tokens(got, T):
            assert (got[:, end:] == 0).all()
            got, alone = got[:, :end], alone[:, :end]
        assert got.isfinite().all() and relative_error(got, alone) <= 1e-6


def tensors(T, borders, dtype, K):
    """q, f, v, bound, initial states; the gradients of outputs and final states; borders."""
    N = len(borders) - 1
    q, f, v, b, h0 = (x.to(DEVICE) for x in make_inputs((1, T, 2, K, K), N=N, dtype=torch.float32))
    do, dht = torch.randn_like(q), torch.randn_like(h0)
    q, f, v, do = (x.to(dtype) for x in (q, f, v, do))
    # who reads a border too many finds one
    return [q, f, v, b, h0], [do, dht], torch.tensor([*borders, T], dtype=torch.int32, device=DEVICE)[:-1]


@pytest.mark.parametrize(("T", "borders"), CASES, ids=str)
@pytest.mark.parametrize("save_states", [False, True])
def test_they_come_back_as_zeros(T, borders, save_states, heads):
    inputs, weights, cu_seqlens = tensors(T, borders, **heads)

    def program(q, f, v, b, h0):
        return chunk_hgrn2(
            q, f, v, b, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens, save_states=save_states
        )

    if borders[-1]:
        return check(program, inputs, weights, T, borders[-1])
    o, final, *gradients, dfirst = run(program, inputs, weights, T)
    assert torch.equal(final, inputs[4]) and torch.equal(dfirst, weights[1])
    assert all((x == 0).all() for x in (o, *gradients))


def test_one_projection(heads):
    (q, f, v, b, _), (do, _), cu_seqlens = tensors(100, [0, 1, 34], **heads)
    check(
        lambda qfv, b: chunk_hgrn2_fused(qfv, b, cu_seqlens=cu_seqlens)[:1],
        [torch.stack((q, f, v), 3), b], [do], 100, 34,
    )  # fmt: skip


@pytest.mark.parametrize("fill", [1, 64])
def test_what_they_would_do_to_a_state(fill, heads, monkeypatch):
    monkeypatch.setattr(chunk_plan, "FILL", fill)
    (_, f, v, b, _), (_, dht), cu_seqlens = tensors(900, [0, 300, 600], **heads)
    weights = [dht, dht[..., 0].contiguous()]
    check(lambda f, v, b: shard_states(f, v, b, cu_seqlens=cu_seqlens), [f, v, b], weights, 900, 600)


def test_split_sequences(heads):
    (q, f, v, b, _), (do, _), cu_seqlens = tensors(100, [0, 20, 40, 50], **heads)
    ends = torch.tensor([0, 1, -1], dtype=torch.int32, device=DEVICE)
    pieces = Pieces(cu_seqlens, ends, ends, 2)
    check(
        lambda qfv, b: [chunk_hgrn2_sharded(qfv, b, hand_on(2), pieces=pieces)],
        [torch.stack((q, f, v), 3), b], [do], 100, 50,
    )  # fmt: skip


def test_the_recurrence_agrees():
    inputs, _, cu_seqlens = tensors(40, [0, 9, 30], torch.float32, 16)
    options = dict(initial_state=inputs[4], output_final_state=True, cu_seqlens=cu_seqlens)
    got, want = (f(*inputs[:4], **options) for f in (chunk_hgrn2_pytorch, recurrent_hgrn2))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_chunks_enough_for_any_borders():
    C, most = 4, {}
    for T, N in itertools.product(range(1, 11), range(1, 4)):
        for inside in itertools.combinations_with_replacement(range(T + 1), N):
            borders = [0, *inside, T]
            needed = sum(-(-(b - a) // C) for a, b in itertools.pairwise(borders))
            most[T, N] = max(needed, most.get((T, N), 0))
    # and where there are tokens enough to cut every part short, none too many
    for (T, N), needed in most.items():
        planned = chunk_plan.Chunks.of(1, T, N, C).NC
        assert planned == needed if T > N else planned >= needed
