"""The shards of a split sequence against the float64 recurrence over the whole: values and every gradient."""

import operator_cases
import pytest
import torch
import torch.nn.functional as F
from operator_cases import CEILING, GATES, relative_error

from hgrn2_kernels import chunk_hgrn2, recurrent_hgrn2
from hgrn2_kernels.shard_states import combine_states, shard_states

F32, F64 = torch.float32, torch.float64


def make_inputs(B, T, H, K, V, gate="plain", bound="learned", N=None, dtype=F64):
    """q, f, v, lower_bound, initial_state in dtype."""
    return operator_cases.make_inputs((B, T, H, K, V), gate, bound, N, dtype)


def spans(f, cu_seqlens):
    """Batch row and tokens of each sequence."""
    if cu_seqlens is None:
        return [(n, slice(None)) for n in range(len(f))]
    borders = cu_seqlens.tolist()
    return [(0, slice(start, end)) for start, end in zip(borders, borders[1:], strict=False)]


def by_definition(f, v, b, *, cu_seqlens=None):
    """`shard_states` from the recurrence, and log forget by a formula that is exact enough in float64."""
    _, state = recurrent_hgrn2(f, f, v, b, output_final_state=True, cu_seqlens=cu_seqlens)
    # autograd's gradient of sigmoid cancels where that of logsigmoid does not
    g = F.logsigmoid(f)
    if b is not None:
        g = torch.where(b > 0, torch.log(b + (1 - b) * g.exp()), g)
    return state, torch.stack([g[n, span].sum(0) for n, span in spans(f, cu_seqlens)])


def run(op, inputs, weights, dtype=None, **kwargs):
    """Outputs of op, and gradients of their sum under weights."""
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = op(*leaves, **kwargs)
    torch.autograd.backward(outputs, [w.to(y.dtype) for y, w in zip(outputs, weights, strict=True)])
    return [y.detach() for y in outputs], [None if x is None else x.grad for x in leaves]


def assert_equal(got, want, ceiling, names):
    for name, a, b in zip(names, got, want, strict=True):
        if b is None:
            assert a is None, name
            continue
        assert a.isfinite().all(), name
        assert relative_error(a, b) <= ceiling, name


def check_against_definition(inputs, cu_seqlens=None):
    f, v, b = inputs
    N = len(spans(f, cu_seqlens))
    torch.manual_seed(1)
    weights = [torch.randn(N, *f.shape[2:], v.shape[-1]), torch.randn(N, *f.shape[2:])]
    got, got_grads = run(shard_states, inputs, weights, cu_seqlens=cu_seqlens)
    want, want_grads = run(by_definition, inputs, weights, dtype=F64, cu_seqlens=cu_seqlens)
    if b is not None:
        assert (got_grads[2][b == 0] == 0).all()
        got_grads[2], want_grads[2] = got_grads[2][b > 0], want_grads[2][b > 0]
    assert [x.dtype for x in got] == 2 * [F64 if f.dtype == F64 else F32]
    assert_equal(got, want, CEILING[got[0].dtype], ("state", "log_decay"))
    # a gradient is rounded to the dtype of its input
    ceiling = CEILING.get(f.dtype, 3e-3)
    assert_equal(got_grads, want_grads, ceiling, ("df", "dv", "dlower_bound"))


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("bound", ["none", "half-zero", "learned"])
def test_is_the_recurrence(bound, gate, dtype):
    check_against_definition(make_inputs(1, 140, 2, 12, 10, gate, bound, dtype=dtype)[1:4])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3, 2, 1, 4, 2), (2, 64, 1, 8, 8), (1, 257, 2, 5, 16)], ids=str)
def test_any_length(shape):
    check_against_definition(make_inputs(*shape)[1:4])


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("gate", ["open", "closed-now-and-then"])
def test_packed_sequences(gate, dtype):
    cu_seqlens = torch.tensor([0, 0, 65, 66, 66, 200, 230, 358, 358], dtype=torch.int32)
    inputs = make_inputs(1, 358, 2, 6, 10, gate, "half-zero", dtype=dtype)[1:4]
    check_against_definition(inputs, cu_seqlens)
    state, log_decay = shard_states(*inputs, cu_seqlens=cu_seqlens)
    empty = [0, 3, 7]
    assert (state[empty] == 0).all() and (log_decay[empty] == 0).all()


@pytest.mark.parametrize("output", ["state", "log_decay"])
def test_only_one_output_is_used(output):
    inputs = make_inputs(2, 70, 2, 6, 4, bound="half-zero")[1:4]
    f, v, b = inputs
    leaves = [x.requires_grad_() for x in inputs]
    grads = []
    for op in (shard_states, by_definition):
        y = op(*leaves)[output == "log_decay"]
        grads.append(torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True, materialize_grads=True))
    got, want = ([df, dv, db[b > 0]] for df, dv, db in grads)
    assert_equal(got, want, 1e-11, ("df", "dv", "dlower_bound"))


def test_gradcheck():
    f, v, b = (x.requires_grad_() for x in make_inputs(1, 5, 2, 3, 2)[1:4])
    assert torch.autograd.gradcheck(shard_states, (f, v, b))
    states, log_decays = torch.randn(3, 2, 1, 2, 3, dtype=F64), torch.randn(3, 2, 1, 2, dtype=F64)
    inputs = [x.requires_grad_() for x in (states, log_decays, torch.randn(2, 1, 2, 3, dtype=F64))]
    assert torch.autograd.gradcheck(combine_states, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype):
    f, v, b = make_inputs(2, 150, 2, 16, 16, "open", dtype=F32)[1:4]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_against_definition([f.to(dtype), v.to(dtype), b])


@pytest.mark.parametrize("bound", [None, 0.0, 1e-30, 0.5])
def test_extreme_gates_stay_finite(bound):
    f = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38]).expand(1, 70, 1, 6)
    v = torch.randn(1, 70, 1, 4)
    b = None if bound is None else torch.full((1, 6), bound)
    weights = torch.randn(1, 1, 6, 4), torch.randn(1, 1, 6)
    outputs, grads = run(shard_states, (f, v, b), weights)
    assert all(x.isfinite().all() for x in (*outputs, *grads) if x is not None)
    assert (outputs[1] <= 0).all()


@pytest.mark.parametrize("bound", [1e-30, 1e-6])
def test_a_closed_gate_is_its_bound(bound):
    # 1 - k has no digits left here
    f, v, b = torch.full((1, 70, 1, 4), -100.0), torch.ones(1, 70, 1, 4), torch.full((1, 4), bound)
    _, log_decay = shard_states(f, v, b)
    assert relative_error(log_decay, 70 * b.double().log()[None]) <= 1e-6


def test_strided_views():
    B, T, H, D = 2, 70, 2, 8
    torch.manual_seed(0)
    fused, b = torch.randn(T, B, H * 2 * D, dtype=F64, requires_grad=True), torch.rand(H, D, dtype=F64)
    grads = []
    for op in (shard_states, by_definition):
        f, v = fused.unflatten(-1, (H, 2, D)).transpose(0, 1).unbind(3)
        state, log_decay = op(f, v, b)
        grads.append(torch.autograd.grad(state.sin().sum() + log_decay.cos().sum(), fused)[0])
    assert relative_error(*grads) <= 1e-11


def test_saves_its_inputs_only():
    inputs = [x.requires_grad_() for x in make_inputs(1, 256, 2, 16, 16, dtype=F32)[1:4]]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        shard_states(*inputs)
    assert sorted(x.data_ptr() for x in saved) == sorted(x.data_ptr() for x in inputs)


def test_no_initial_state_is_zeros():
    states, log_decays = torch.randn(3, 2, 1, 4, 5), -torch.rand(3, 2, 1, 4)
    got = combine_states(states, log_decays)
    want = combine_states(states, log_decays, torch.zeros(2, 1, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[0][0] == 0).all() and torch.equal(got[0][1], states[0])


def in_shards(cuts):
    """Return the operator over shards of tokens that exchange only states."""

    def op(q, f, v, b, h0, cu_seqlens=None):
        # each packed sequence is cut like a row of a batch; a shard of it may be empty
        borders = None if cu_seqlens is None else cu_seqlens.tolist()
        shards = []
        for start, end in zip((0, *cuts), (*cuts, q.shape[1]), strict=True):
            inside = None if borders is None else [min(max(x, start), end) - start for x in borders]
            local = None if inside is None else torch.tensor(inside, dtype=torch.int32)
            shards.append(([x[:, start:end] for x in (q, f, v)], local))
        summaries = [shard_states(f, v, b, cu_seqlens=local) for (_, f, v), local in shards]
        states, log_decays = (torch.stack(x) for x in zip(*summaries, strict=True))
        entering, final = combine_states(states, log_decays, h0)
        outputs = [
            chunk_hgrn2(*qfv, b, initial_state=h, cu_seqlens=local)[0]
            for (qfv, local), h in zip(shards, entering, strict=True)
        ]
        return torch.cat(outputs, dim=1), final

    return op


def whole(q, f, v, b, h0, cu_seqlens=None):
    return recurrent_hgrn2(q, f, v, b, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens)


def check_against_the_whole(gate, dtype, N, cu_seqlens=None):
    B, T, cuts = 1 if cu_seqlens is not None else N, 160, (70, 71, 140)
    inputs = make_inputs(B, T, 2, 12, 10, gate, "half-zero", N, dtype)
    b = inputs[3]
    torch.manual_seed(1)
    weights = torch.randn(B, T, 2, 10), torch.randn(N, 2, 12, 10)
    got, got_grads = run(in_shards(cuts), inputs, weights, cu_seqlens=cu_seqlens)
    want, want_grads = run(whole, inputs, weights, dtype=F64, cu_seqlens=cu_seqlens)
    assert (got_grads[3][b == 0] == 0).all()
    got_grads[3], want_grads[3] = got_grads[3][b > 0], want_grads[3][b > 0]
    names = ("o", "final_state", "dq", "df", "dv", "dlower_bound", "dinitial_state")
    assert_equal(got + got_grads, want + want_grads, CEILING[dtype], names)


@pytest.mark.parametrize("dtype", CEILING, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_shards_make_the_whole(gate, dtype):
    check_against_the_whole(gate, dtype, N=2)


@pytest.mark.parametrize("dtype", CEILING, ids=str)
def test_shards_make_the_whole_of_packed_sequences(dtype):
    cu_seqlens = torch.tensor([0, 40, 41, 41, 160], dtype=torch.int32)
    check_against_the_whole("open", dtype, N=4, cu_seqlens=cu_seqlens)


def bad(match, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("split off the heads", f=torch.zeros(1, 8, 8)),
        bad("v .B, T, H, V., got", v=torch.zeros(1, 7, 2, 3)),
        bad("share a dtype", v=torch.zeros(1, 8, 2, 3).bfloat16()),
        bad("lower_bound must be .2, 4.", lower_bound=torch.zeros(8)),
        bad("must be int32", cu_seqlens=torch.tensor([0, 8])),
        bad("from 0 to at most T = 8", cu_seqlens=torch.tensor([0, 9]).int()),
    ],
)
def test_shard_states_rejects(changes, match):
    _, f, v, b, _ = make_inputs(1, 8, 2, 4, 3, dtype=F32)
    arguments = {"f": f, "v": v, "lower_bound": b} | changes
    with pytest.raises(ValueError, match=match):
        shard_states(**arguments)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("states must be .M, N, H, K, V.", states=torch.zeros(2, 2, 4, 3)),
        bad("stack the results", log_decays=torch.zeros(2, 1, 2, 4)),
        bad("stack the results", states=torch.zeros(0, 1, 2, 4, 3), log_decays=torch.zeros(0, 1, 2, 4)),
        bad("initial_state must be .1, 2, 4, 3.", initial_state=torch.zeros(3, 1, 2, 4, 3)),
        bad("initial_state must be torch.float32", initial_state=torch.zeros(1, 2, 4, 3).double()),
        bad("log_decays must be torch.float32 on cpu", log_decays=torch.zeros(3, 1, 2, 4, device="meta")),
    ],
)
def test_combine_states_rejects(changes, match):
    arguments = {"states": torch.zeros(3, 1, 2, 4, 3), "log_decays": torch.zeros(3, 1, 2, 4)} | changes
    with pytest.raises(ValueError, match=match):
        combine_states(**arguments)
