"""The operator against the float64 recurrence, and the promises of its docstring."""

import pytest
import torch
from operator_cases import CEILING, GATES, NAMES, assert_equal, bounds, make_inputs, relative_error, run
from torch.utils.checkpoint import checkpoint

from hgrn2_kernels import (
    Pieces,
    chunk_hgrn2,
    chunk_hgrn2_fused,
    chunk_hgrn2_pytorch,
    chunk_hgrn2_sharded,
    implementation,
    recurrent_hgrn2,
    shard_states,
)


def check_against_recurrence(inputs, cu_seqlens=None):
    got = run(chunk_hgrn2, inputs, cu_seqlens)
    gold = run(recurrent_hgrn2, inputs, cu_seqlens, dtype=torch.float64)
    assert_equal(got, gold, CEILING[inputs[0].dtype], lower_bound=inputs[3])


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bound", ["none", "half-zero", "learned", "zero"])
def test_is_the_recurrence(bound, gate, dtype):
    check_against_recurrence(make_inputs((2, 150, 2, 12, 20), gate, bound, dtype=dtype))


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1),
        (3, 2, 1, 4, 2),
        (1, 15, 3, 5, 16),
        (2, 64, 1, 8, 8),
        (2, 100, 2, 16, 8),
        (1, 257, 1, 8, 3),
    ],
    ids=str,
)
def test_any_length(shape, dtype):
    check_against_recurrence(make_inputs(shape, "over-16", dtype=dtype))


def test_rounding_of_an_almost_open_gate_does_not_build_up():
    # a constant gate is rounded the same way at each token: without care the final state is off by 6e-5
    T, K = 2048, 32
    q, f, v, b, h0 = make_inputs((1, T, 1, K, 4), dtype=torch.float32)
    f = torch.linspace(6, 12, K).expand_as(f)
    inputs = [q, f, v, b, torch.ones_like(h0)]
    gold = run(chunk_hgrn2, inputs, dtype=torch.float64)
    assert_equal(run(chunk_hgrn2, inputs), gold, CEILING[torch.float32])


def test_a_nearly_forgotten_state_keeps_its_digits():
    # 64 tokens leave about 1e-6 of the state: one minus what they took would have one digit
    q, f, v, b, h0 = make_inputs((2, 64, 2, 8, 4), bound="none", dtype=torch.float32)
    inputs = [q, f / 4 + 1.5, v, b, 1e20 * h0]
    got, gold = run(chunk_hgrn2, inputs), run(recurrent_hgrn2, inputs, dtype=torch.float64)
    assert relative_error(got["final_state"], gold["final_state"]) <= CEILING[torch.float32]


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("gate", ["over-16", "closed-now-and-then"])
def test_packed_is_each_sequence_alone(gate, dtype):
    borders = [0, 0, 65, 66, 66, 200, 230, 358, 358]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    N = len(borders) - 1
    inputs = make_inputs((1, borders[-1], 2, 6, 10), gate, "half-zero", N, dtype)
    check_against_recurrence(inputs, cu_seqlens)

    leaves = [x.clone().requires_grad_() for x in inputs]
    q, f, v, b, h0 = leaves
    parts = [
        chunk_hgrn2(q[:, s:e], f[:, s:e], v[:, s:e], b, initial_state=h0[n : n + 1], output_final_state=True)
        if e > s
        else (v[:, s:e], h0[n : n + 1])
        for n, (s, e) in enumerate(zip(borders, borders[1:], strict=False))
    ]
    o, ht = (torch.cat(x, dim=i) for x, i in zip(zip(*parts, strict=True), (1, 0), strict=True))
    torch.manual_seed(1)
    torch.autograd.backward((o, ht), [torch.randn(x.shape).to(dtype) for x in (o, ht)])
    alone = dict(zip(NAMES, (o.detach(), ht.detach(), *(x.grad for x in leaves)), strict=True))
    packed = run(chunk_hgrn2, inputs, cu_seqlens)
    assert_equal(packed, alone, CEILING[dtype])


def test_gradcheck():
    inputs = make_inputs((1, 5, 2, 3, 2))
    leaves = [x.requires_grad_() for x in inputs]

    def op(q, f, v, b, h0):
        return chunk_hgrn2(q, f, v, b, scale=0.7, initial_state=h0, output_final_state=True)

    assert torch.autograd.gradcheck(op, leaves)


def test_gradient_of_a_bound_of_zero_is_zero():
    inputs = make_inputs((1, 40, 2, 8, 4), bound="half-zero")
    got = run(chunk_hgrn2, inputs)["dlower_bound"]
    assert (got[:, ::2] == 0).all() and (got[:, 1::2] != 0).all()


def test_extreme_gates_stay_finite():
    q, _, v, b, h0 = make_inputs((1, 70, 1, 6, 4), bound="half-zero", dtype=torch.float32)
    f = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38]).expand_as(q)
    got = run(chunk_hgrn2, [q, f, v, b, h0])
    assert all(x.isfinite().all() for x in got.values())


def test_default_scale_and_no_state():
    q, f, v, b, h0 = make_inputs((2, 20, 2, 9, 4))
    o, ht = chunk_hgrn2(q, f, v, b)
    assert ht is None
    want, _ = recurrent_hgrn2(q, f, v, b, scale=1 / 3, initial_state=torch.zeros_like(h0))
    assert relative_error(o, want) <= CEILING[torch.float64]


def test_only_the_final_state_is_used():
    q, f, v, b, _ = make_inputs((2, 70, 2, 6, 4))
    f.requires_grad_()
    grads = []
    for op in (chunk_hgrn2, recurrent_hgrn2):
        _, ht = op(q, f, v, b, output_final_state=True)
        grads.append(torch.autograd.grad(ht.square().sum(), f)[0])
    assert relative_error(*grads) <= CEILING[torch.float64]


def test_strided_views_of_a_fused_projection():
    B, T, H, D = 2, 70, 2, 8
    torch.manual_seed(0)
    # [T, B, ..] memory seen as [B, T, ..], as Megatron's hidden_states are
    fused = torch.randn(T, B, 3 * H * D, dtype=torch.float64, requires_grad=True)
    b = bounds("learned", H, D)
    grads = []
    for op in (chunk_hgrn2, recurrent_hgrn2):
        q, f, v = (x.unflatten(-1, (H, D)).transpose(0, 1) for x in fused.chunk(3, dim=-1))
        o, _ = op(q, f, v, b)
        grads.append(torch.autograd.grad(o.sin().sum(), fused)[0])
    assert relative_error(*grads) <= CEILING[torch.float64]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["plain", "over-256"])
def test_half_precision_inputs(gate, dtype):
    q, f, v, b, h0 = make_inputs((2, 150, 2, 16, 16), gate, dtype=torch.float32)
    inputs = [q.to(dtype), f.to(dtype), v.to(dtype), b, h0]
    got = run(chunk_hgrn2, inputs)
    assert [x.dtype for x in got.values()] == [dtype, torch.float32, dtype, dtype, dtype] + [torch.float32] * 2
    gold = run(recurrent_hgrn2, inputs, dtype=torch.float64)
    # rounding a tensor to bf16 alone costs 1.7e-3, and its output gradient arrives rounded too
    fp32 = CEILING[torch.float32]
    assert relative_error(got["final_state"], gold["final_state"]) <= fp32
    assert_equal(got, gold, 5e-3, lower_bound=b)


def test_two_halves_with_the_state_handed_over():
    inputs = make_inputs((2, 150, 2, 6, 10), "over-16")

    def in_two(q, f, v, b, initial_state, cut=83, **_):
        o1, h = chunk_hgrn2(*(x[:, :cut] for x in (q, f, v)), b, initial_state=initial_state, output_final_state=True)
        o2, h = chunk_hgrn2(*(x[:, cut:] for x in (q, f, v)), b, initial_state=h, output_final_state=True)
        return torch.cat((o1, o2), dim=1), h

    assert_equal(run(in_two, inputs), run(chunk_hgrn2, inputs), CEILING[torch.float64])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    inputs = make_inputs((2, 70, 2, 6, 10))

    def positional(q, f, v, b, h):
        return chunk_hgrn2(q, f, v, b, initial_state=h, output_final_state=True)

    def checkpointed(q, f, v, b, initial_state, **_):
        return checkpoint(positional, q, f, v, b, initial_state, use_reentrant=use_reentrant)

    assert_equal(run(checkpointed, inputs), run(chunk_hgrn2, inputs), 0)


@pytest.mark.parametrize("cu_seqlens", [None, [0, 5, 64]])
@pytest.mark.parametrize("T", [5, 64])
@pytest.mark.parametrize("operator", ["chunk", "fused", "sharded", "shard_states"])
def test_results_can_be_changed_in_place(operator, T, cu_seqlens):
    q, f, v, b, _ = make_inputs((1, T, 2, 16, 16), "plain", "learned", dtype=torch.float32)
    borders = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32).clamp(max=T)
    v.requires_grad_()

    def results():
        if operator == "chunk":
            return chunk_hgrn2(q, f, v, b, output_final_state=True, cu_seqlens=borders)
        if operator == "shard_states":
            return shard_states(f, v, b, cu_seqlens=borders)
        qfv = torch.stack((q, f, v), 3)
        if operator == "fused":
            return chunk_hgrn2_fused(qfv, b, output_final_state=True, cu_seqlens=borders)
        ends = borders if borders is None else torch.tensor([0, -1], dtype=torch.int32)
        pieces = ends if ends is None else Pieces(borders, ends, ends, 1)
        return (chunk_hgrn2_sharded(qfv, b, lambda state, *_: lambda: torch.zeros_like(state), pieces=pieces),)

    expected = torch.autograd.grad(sum((3 * x).sum() for x in results()), v)[0]
    changed = results()
    for x in changed:
        x *= 3
    assert torch.equal(torch.autograd.grad(sum(x.sum() for x in changed), v)[0], expected)


def test_autocast_changes_nothing():
    inputs = make_inputs((1, 70, 2, 6, 10), dtype=torch.float32)
    want = run(chunk_hgrn2, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(chunk_hgrn2, inputs)
    assert_equal(got, want, 0)


@pytest.mark.parametrize("alone", range(5))
def test_only_one_input_needs_a_gradient(alone):
    inputs = make_inputs((1, 70, 2, 6, 10))
    want = run(chunk_hgrn2, inputs)[NAMES[2 + alone]]
    inputs[alone].requires_grad_()
    q, f, v, b, h0 = inputs
    o, ht = chunk_hgrn2(q, f, v, b, initial_state=h0, output_final_state=True)
    torch.manual_seed(1)
    torch.autograd.backward((o, ht), [torch.randn(x.shape).to(x.dtype) for x in (o, ht)])
    assert [x.grad is None for x in inputs] == [i != alone for i in range(5)]
    assert torch.equal(inputs[alone].grad, want)


def test_saves_its_inputs_only():
    inputs = [x.requires_grad_() for x in make_inputs((1, 256, 2, 16, 16), dtype=torch.float32)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        q, f, v, b, h0 = inputs
        chunk_hgrn2(q, f, v, b, initial_state=h0)
    assert sum(x.nbytes for x in saved) == sum(x.nbytes for x in inputs)
    assert {x.data_ptr() for x in saved if x.numel()} == {x.data_ptr() for x in inputs}


def bad(match, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("q and f must be", f=torch.zeros(1, 8, 2, 5)),
        bad("q and f must be .B, T, H, K. and v", v=torch.zeros(1, 7, 2, 3)),
        bad("split off the heads", q=torch.zeros(1, 8, 8), f=torch.zeros(1, 8, 8)),
        bad("skip the call", q=torch.zeros(1, 0, 2, 4), f=torch.zeros(1, 0, 2, 4), v=torch.zeros(1, 0, 2, 3)),
        bad("share a dtype", v=torch.zeros(1, 8, 2, 3).bfloat16()),
        bad("cast q, f and v", q=torch.zeros(1, 8, 2, 4).int()),
        bad("share a device", v=torch.zeros(1, 8, 2, 3, device="meta")),
        bad("lower_bound must be .2, 4.", lower_bound=torch.zeros(8)),
        bad("lower_bound must be torch.float32", lower_bound=torch.zeros(2, 4).bfloat16()),
        bad("lower_bound must be on", lower_bound=torch.zeros(2, 4, device="meta")),
        bad("initial_state must be .1, 2, 4, 3.", initial_state=torch.zeros(2, 2, 4, 3)),
        bad(
            "initial_state must be .2, 2, 4, 3.",
            initial_state=torch.zeros(1, 2, 4, 3),
            cu_seqlens=torch.tensor([0, 3, 8]).int(),
        ),
        bad("initial_state must be torch.float32", initial_state=torch.zeros(1, 2, 4, 3).double()),
        bad("must be int32", cu_seqlens=torch.tensor([0, 8])),
        bad("0 and the end", cu_seqlens=torch.tensor([8]).int()),
        bad("from 0 to at most T = 8", cu_seqlens=torch.tensor([0, 9]).int()),
        bad("from 0 to at most T = 8 ", cu_seqlens=torch.tensor([1, 8]).int()),
        bad("without decreasing", cu_seqlens=torch.tensor([0, 5, 3, 8]).int()),
        bad(
            "cu_seqlens needs B = 1",
            q=torch.zeros(2, 8, 2, 4),
            f=torch.zeros(2, 8, 2, 4),
            v=torch.zeros(2, 8, 2, 3),
            cu_seqlens=torch.tensor([0, 8]).int(),
        ),
    ],
)
def test_rejects(changes, match):
    q, f, v, b, _ = make_inputs((1, 8, 2, 4, 3), dtype=torch.float32)
    arguments = {"q": q, "f": f, "v": v, "lower_bound": b} | changes
    with pytest.raises(ValueError, match=match):
        chunk_hgrn2(**arguments)


@pytest.mark.parametrize(
    ("device", "dtype", "want"),
    [
        ("cuda", torch.bfloat16, "triton"),
        ("cuda:1", torch.float32, "triton"),
        ("cuda", torch.float64, "pytorch"),
        ("cpu", torch.bfloat16, "pytorch"),
    ],
)
def test_what_runs_where(device, dtype, want):
    assert implementation(device, dtype) == want


def test_one_projection():
    q, f, v, b, h0 = make_inputs((2, 20, 2, 4, 4))
    want = chunk_hgrn2(q, f, v, b, initial_state=h0, output_final_state=True)
    qfv = torch.stack((q, f, v), 3)
    got = chunk_hgrn2_fused(qfv, b, initial_state=h0, output_final_state=True)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    with pytest.raises(ValueError, match=r"\[B, T, H, 3, K\]"):
        chunk_hgrn2_fused(qfv.transpose(2, 3), b)


def test_the_pytorch_form_has_a_name_of_its_own():
    q, f, v, b, h0 = make_inputs((1, 20, 1, 4, 4))
    got, want = (op(q, f, v, b, initial_state=h0, output_final_state=True) for op in (chunk_hgrn2_pytorch, chunk_hgrn2))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
