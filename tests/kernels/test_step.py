"""Decoding against the float64 recurrence: the PyTorch path, and the kernel in Triton's interpreter or on a GPU."""

import operator_cases
import pytest
import torch
from operator_cases import relative_error

from hgrn2_kernels import chunk_hgrn2, recurrent_hgrn2
from hgrn2_kernels.step import step_hgrn2

CUDA = torch.cuda.is_available()

F32, F64 = torch.float32, torch.float64
PATHS = ["torch", "triton"]
# the path, the dtype, and what its relative Frobenius error may be
RUNS = [
    pytest.param(*x, id=f"{x[0]}-{x[1]}") for x in (("torch", F64, 1e-12), ("torch", F32, 1e-5), ("triton", F32, 1e-5))
]
# gates that stay as they are, and those that try the operator
GATES = {"closed": -200.0, "open": 30.0, "plain": None, "closed-now-and-then": None, "mixed": None}


def make_inputs(N, T, H, K, V, gate="plain", bound="half-zero", dtype=F32):
    """q, f, v, lower_bound, and a state for each sequence, in dtype."""
    value = GATES[gate]
    inputs = operator_cases.make_inputs((N, T, H, K, V), gate if value is None else "plain", bound, dtype=dtype)
    if value is not None:
        inputs[1].fill_(value)
    return inputs


def to_cuda(x):
    """The same view of a copy of the whole storage: strides and neighbours are part of the tests."""
    storage = torch.empty(0, dtype=x.dtype, device="cuda").set_(x.untyped_storage().cuda())
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def step(path, q, f, v, b, state, slots=None, scale=None):
    """The step by either path, for CPU tensors; updates state."""
    if path == "torch":
        return step_hgrn2(q, f, v, b, state, slots, scale=scale)
    if CUDA:
        inputs = [x if x is None else to_cuda(x) for x in (q, f, v, b, state, slots)]
        o = step_hgrn2(*inputs, scale=scale).cpu()
        state.untyped_storage().copy_(inputs[4].untyped_storage().cpu())
        return o
    from hgrn2_kernels.step_kernel import launch_step

    return launch_step(q, f, v, b, state, slots, q.shape[-1] ** -0.5 if scale is None else scale)


def gold(q, f, v, b, state):
    q, f, v, b, state = (x if x is None else x.double() for x in (q, f, v, b, state))
    return recurrent_hgrn2(q, f, v, b, initial_state=state, output_final_state=True)


@pytest.mark.parametrize(("path", "dtype", "ceiling"), RUNS)
@pytest.mark.parametrize(
    ("gate", "bound"), [("plain", "none"), ("plain", "learned"), *((gate, "half-zero") for gate in GATES)]
)
def test_token_by_token_is_the_recurrence(gate, bound, path, dtype, ceiling):
    q, f, v, b, state = make_inputs(2, 20, 2, 24, 40, gate, bound, dtype)
    want, want_state = gold(q, f, v, b, state)
    got = torch.cat([step(path, *(x[:, t : t + 1] for x in (q, f, v)), b, state) for t in range(20)], dim=1)
    assert got.dtype == state.dtype == dtype
    assert relative_error(got, want) <= ceiling
    assert relative_error(state, want_state) <= ceiling


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("K", "V"), [(1, 1), (5, 130), (16, 16), (33, 64), (128, 128), (256, 24)])
def test_any_head_size(K, V, path):
    q, f, v, b, state = make_inputs(2, 2, 2, K, V)
    want, want_state = gold(q, f, v, b, state)
    assert relative_error(step(path, q, f, v, b, state), want) <= 1e-5
    assert relative_error(state, want_state) <= 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_tokens_at_once_are_tokens_in_turn(path):
    q, f, v, b, state = make_inputs(3, 3, 2, 24, 40, "mixed")
    at_once, in_turn = state.clone(), state.clone()
    got = step(path, q, f, v, b, at_once, scale=0.7)
    want = [step(path, *(x[:, t : t + 1] for x in (q, f, v)), b, in_turn, scale=0.7) for t in range(3)]
    assert relative_error(got, torch.cat(want, dim=1)) <= 1e-6
    assert relative_error(at_once, in_turn) <= 1e-6
    assert relative_error(step(path, q, f, v, b, state), got * 24**-0.5 / 0.7) <= 1e-6


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_slots(dtype, path):
    q, f, v, b, state = make_inputs(5, 2, 2, 24, 40)
    slots = torch.tensor([6, -1, 0, 3, -1], dtype=dtype)
    active = slots >= 0
    # what padding holds is of no meaning
    for x in (q, f, v):
        x[~active] = torch.nan
    cache = torch.randn(8, 2, 24, 40)
    rows = slots[active].long()
    cache[rows] = state[active]
    cache[5] = torch.nan
    before = cache.clone()
    want, want_state = gold(q[active], f[active], v[active], b, state[active])

    got = step(path, q, f, v, b, cache, slots)
    assert relative_error(got[active], want) <= 1e-5
    assert (got[~active] == 0).all()
    assert relative_error(cache[rows], want_state) <= 1e-5
    others = [s for s in range(8) if s not in slots.tolist()]
    assert torch.equal(cache[others].view(torch.int32), before[others].view(torch.int32))


@pytest.mark.parametrize("path", PATHS)
def test_padding_alone_leaves_the_cache_alone(path):
    q, f, v, b, state = make_inputs(2, 1, 2, 8, 8)
    before = state.clone()
    assert (step(path, q, f, v, b, state, torch.tensor([-1, -1])) == 0).all()
    assert torch.equal(state, before)


@pytest.mark.parametrize("path", PATHS)
def test_strided_views(path):
    N, T, H, D = 3, 2, 2, 16
    torch.manual_seed(0)
    # [T, N, ..] memory seen as [N, T, ..], q, f and i of a head side by side; one layer of a cache of all layers
    fused = torch.randn(T, N, H * 3 * D).transpose(0, 1)
    q, f, v = fused.unflatten(-1, (H, 3, D)).unbind(3)
    cache = torch.randn(N, 3, H, D, D)
    before, b = cache.clone(), torch.rand(H, 2 * D)[:, ::2]
    want, want_state = gold(q, f, v, b, cache[:, 1])
    assert relative_error(step(path, q, f, v, b, cache[:, 1]), want) <= 1e-5
    assert relative_error(cache[:, 1], want_state) <= 1e-5
    assert torch.equal(cache[:, ::2], before[:, ::2])


@pytest.mark.parametrize("path", PATHS)
def test_a_backward_that_saved_the_state_does_not_compute_with_the_next_one(path):
    q, f, v, b, state = make_inputs(2, 3, 2, 16, 16)
    device = "cuda" if CUDA and path == "triton" else "cpu"
    q, f, v, b, state = (x.to(device) for x in (q, f, v, b, state))
    o, _ = chunk_hgrn2(q.requires_grad_(), f, v, b, initial_state=state)
    new = [x[:, :1].detach() for x in (q, f, v)]
    if CUDA or path == "torch":
        with torch.no_grad():
            step_hgrn2(*new, b, state)
    else:
        step(path, *new, b, state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("path", PATHS)
def test_rounding_of_an_almost_open_gate_does_not_build_up(path):
    # a constant gate is rounded the same way at each token: without care the state is off by 8e-6
    T, K = 400, 16
    q, _, v, b, state = make_inputs(1, T, 1, K, 4, bound="none")
    f = torch.linspace(6, 12, K).expand_as(q)
    want, want_state = gold(q, f, v, b, state)
    assert relative_error(step(path, q, f, v, b, state), want) <= 2e-6
    assert relative_error(state, want_state) <= 2e-6


@pytest.mark.parametrize("path", PATHS)
def test_a_nearly_forgotten_state_keeps_its_digits(path):
    q, f, v, b, state = make_inputs(2, 2, 2, 16, 8, bound="none")
    f, state = f - 20, 1e20 * state
    want, want_state = gold(q, f, v, b, state)
    assert relative_error(step(path, q, f, v, b, state), want) <= 1e-5
    assert relative_error(state, want_state) <= 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_extreme_gates_stay_finite(path):
    q, f, v, b, state = make_inputs(1, 3, 1, 6, 4)
    f = torch.tensor([-3e38, -1e4, -90.0, 90.0, 1e4, 3e38]).expand_as(f)
    # silu of -100 is 0, not a quotient of infinities
    q[..., 0] = -100.0
    want, want_state = gold(q, f, v, b, state)
    assert relative_error(step(path, q, f, v, b, state), want) <= 1e-5
    assert relative_error(state, want_state) <= 1e-5


@pytest.mark.parametrize("path", PATHS)
def test_after_a_prefill(path):
    q, f, v, b, state = make_inputs(2, 80, 2, 24, 40)
    want, want_state = gold(q, f, v, b, state)
    o, h = chunk_hgrn2(*(x[:, :76] for x in (q, f, v)), b, initial_state=state, output_final_state=True)
    steps = [step(path, *(x[:, t : t + 1] for x in (q, f, v)), b, h) for t in range(76, 80)]
    assert relative_error(torch.cat((o, *steps), dim=1), want) <= 1e-5
    assert relative_error(h, want_state) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs(dtype):
    q, f, v, b, state = make_inputs(2, 20, 2, 16, 16)
    q, f, v = (x.to(dtype) for x in (q, f, v))
    want, want_state = gold(q, f, v, b, state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = step_hgrn2(q, f, v, b, state)
    assert o.dtype == dtype and state.dtype == F32
    assert relative_error(o, want) <= 3e-3
    assert relative_error(state, want_state) <= 1e-5


def test_takes_parameters_where_no_gradient_is_asked_for():
    inputs = [x.requires_grad_() for x in make_inputs(2, 1, 2, 8, 4)]
    with torch.no_grad():
        assert not step_hgrn2(*inputs).requires_grad


@pytest.mark.parametrize("alone", range(5))
def test_rejects_gradients(alone):
    inputs = make_inputs(2, 1, 2, 8, 4)
    inputs[alone].requires_grad_()
    with pytest.raises(ValueError, match="train with chunk_hgrn2"):
        step_hgrn2(*inputs)


def bad(match, **changes):
    return pytest.param(changes, match, id=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        bad("q and f must be", f=torch.zeros(2, 1, 2, 5)),
        bad("split off the heads", q=torch.zeros(2, 1, 8), f=torch.zeros(2, 1, 8)),
        bad("skip the call", q=torch.zeros(2, 0, 2, 4), f=torch.zeros(2, 0, 2, 4), v=torch.zeros(2, 0, 2, 3)),
        bad("share a dtype", v=torch.zeros(2, 1, 2, 3).half()),
        bad("lower_bound must be .2, 4.", lower_bound=torch.zeros(8)),
        bad("lower_bound must be torch.float32", lower_bound=torch.zeros(2, 4).bfloat16()),
        bad("pass slots", state=torch.zeros(5, 2, 4, 3)),
        bad("state must be .2, 2, 4, 3.", state=torch.zeros(2, 2, 3, 4)),
        bad("state must be .2, 2, 4, 3.", state=torch.zeros(2, 4, 3)),
        bad("state must be .5, 2, 4, 3.", state=torch.zeros(5, 2, 3, 4), slots=torch.tensor([0, 1])),
        bad("state must be .0, 2, 4, 3.", state=torch.zeros(()), slots=torch.tensor([0, 1])),
        bad("state must be torch.float32", state=torch.zeros(2, 2, 4, 3).bfloat16()),
        bad("state must be on", state=torch.zeros(2, 2, 4, 3, device="meta")),
        bad("row of state must be contiguous", state=torch.zeros(2, 2, 3, 4).mT),
        bad("must not overlap another", state=torch.zeros(1, 2, 4, 3).expand(2, -1, -1, -1)),
        bad("slots must be int32 or int64", slots=torch.tensor([0.0, 1.0])),
        bad("slots must be .2.", slots=torch.tensor([0, 1, -1])),
        bad("slots must be on", slots=torch.zeros(2, device="meta").int()),
        bad("q must be contiguous in its last", q=torch.zeros(2, 1, 4, 2).mT),
        bad("f must be contiguous in its last", f=torch.zeros(2, 1, 2, 1).expand(2, 1, 2, 4)),
        bad("v must be contiguous in its last", v=torch.zeros(2, 1, 2, 6)[..., ::2]),
    ],
)
def test_rejects(changes, match):
    names = ("q", "f", "v", "lower_bound", "state")
    arguments = dict(zip(names, make_inputs(2, 1, 2, 4, 3), strict=True)) | changes
    with pytest.raises(ValueError, match=match):
        step_hgrn2(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("K", "V"), [(128, 128), (64, 64), (24, 40), (256, 256)])
def test_on_a_gpu(K, V, dtype):
    q, f, v, b, state = make_inputs(5, 2, 4, K, V, "closed-now-and-then")
    q, f, v = (x.to(dtype) for x in (q, f, v))
    want, want_state = gold(q, f, v, b, state)
    q, f, v, b, state = (x.cuda() for x in (q, f, v, b, state))
    o = step_hgrn2(q, f, v, b, state)
    assert o.dtype == dtype
    # an output that fp64 rounds to bf16 is 1.7e-3 off, to fp16 2e-4
    assert relative_error(o.cpu(), want) <= {F32: 1e-5, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}[dtype]
    assert relative_error(state.cpu(), want_state) <= 1e-5


@pytest.mark.gpu
def test_fp64_on_a_gpu():
    q, f, v, b, state = make_inputs(2, 2, 2, 16, 8, dtype=F64)
    want, _ = gold(q, f, v, b, state)
    got = step_hgrn2(*(x.cuda() for x in (q, f, v, b, state)), torch.tensor([0, 1]).cuda())
    assert relative_error(got.cpu(), want) <= 1e-12


@pytest.mark.gpu
def test_replay_of_a_cuda_graph():
    N, K = 4, 64
    first, second = (make_inputs(N, 1, 2, K, K, gate) for gate in ("plain", "mixed"))
    b, cache = first[3], torch.randn(6, 2, K, K)
    slots = [torch.tensor(x, dtype=torch.int32) for x in ([5, -1, 0, 2], [0, 1, 2, -1])]
    want_cache = cache.clone()
    want = [
        step_hgrn2(*x[:3], b, want_cache, where)
        for x, where in ((first, slots[0]), (second, slots[1]), (second, slots[1]))
    ]

    q, f, v, where, bound, got_cache = (x.cuda() for x in (*first[:3], slots[0], b, cache))
    # compile before the capture, on a cache of its own; a wait for the device would raise
    step_hgrn2(q, f, v, bound, got_cache.clone(), where)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = step_hgrn2(q, f, v, bound, got_cache, where)
    for n, x in enumerate((first, second, second)):
        for static, new in zip((q, f, v, where), (*x[:3], slots[min(n, 1)]), strict=True):
            static.copy_(new)
        graph.replay()
        assert relative_error(o.cpu(), want[n]) <= 1e-5
    assert relative_error(got_cache.cpu(), want_cache) <= 1e-5
