"""Test inputs for the operator, with gates of many strengths, and the comparison with the recurrence."""

import torch
import torch.nn.functional as F

from hgrn2_kernels import combine_states, dispatch

TRITON_RELEASE = dispatch.RELEASE
CEILING = {torch.float64: 1e-11, torch.float32: 1e-5}
NAMES = ("o", "final_state", "dq", "df", "dv", "dlower_bound", "dinitial_state")


def relative_error(got, want):
    """Return the relative Frobenius error of got against want, computed in float64."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def slower(x, n):
    """Return the raw gate whose log gate is 1/n of that of x: logit(sigmoid(x) ** (1 / n)) without cancellation."""
    g = F.logsigmoid(x) / n
    return g - torch.log(-torch.expm1(g))


def closed_now_and_then(x):
    return torch.where(torch.rand_like(x) < 0.07, -200.0, x + 4)


def one_scale_a_channel(x):
    own = dict(steps=x.shape[-1], dtype=x.dtype, device=x.device)
    return x * torch.logspace(-2, 1.5, **own) + torch.linspace(-20, 8, **own)


GATES = {
    "plain": lambda x: x,
    "over-16": lambda x: slower(x, 16),
    "over-256": lambda x: slower(x, 256),
    "times-16": lambda x: 16 * x,
    "all-closed": lambda x: x - 30,
    "closed-now-and-then": closed_now_and_then,
    "open": lambda x: x + 6,
    "mixed": one_scale_a_channel,
}
# only for the kernels, which cut chunks into bands: gates as in a trained model, and stronger ones
ALL_GATES = GATES | {
    "times-4": lambda x: 4 * x,
    "half-closed": lambda x: x - 3,
    "closing": lambda x: x - 6,
    "nearly-closed": lambda x: x - 12,
}


def bounds(kind, H, K):
    b = torch.empty(H, K, dtype=torch.float64).uniform_(0.04, 0.94)
    if kind == "half-zero":
        b[:, ::2] = 0
    return {"none": None, "learned": b, "half-zero": b, "zero": torch.zeros_like(b)}[kind]


def make_inputs(shape, gate="plain", bound="learned", N=None, dtype=torch.float64):
    """Return q, f, v, lower_bound and initial_state in dtype."""
    B, T, H, K, V = shape
    torch.manual_seed(0)
    q, x = torch.randn(2, B, T, H, K, dtype=torch.float64)
    v = torch.randn(B, T, H, V, dtype=torch.float64)
    h0 = torch.randn(B if N is None else N, H, K, V, dtype=torch.float64)
    inputs = (q, ALL_GATES[gate](x), v, bounds(bound, H, K), h0)
    return [y if y is None else y.to(dtype) for y in inputs]


def run(op, inputs, cu_seqlens=None, dtype=None):
    """Return the outputs and gradients of op, keyed by NAMES. The output gradients do not depend on op or dtype."""
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    q, f, v, lower_bound, h0 = leaves
    o, ht = op(q, f, v, lower_bound, initial_state=h0, output_final_state=True, cu_seqlens=cu_seqlens)
    torch.manual_seed(1)
    do, dht = (torch.randn(y.shape).to(y) for y in (o, ht))
    torch.autograd.backward((o, ht), (do, dht))
    grads = [None if x is None else x.grad for x in (q, f, v, lower_bound, h0)]
    return dict(zip(NAMES, (o.detach(), ht.detach(), *grads), strict=True))


def assert_equal(got, want, ceiling, lower_bound=None):
    """Assert that every tensor of two runs agrees up to a relative error of ceiling."""
    for name in NAMES:
        if want[name] is None:
            assert got[name] is None, name
            continue
        a, b = got[name], want[name]
        if name == "dlower_bound" and lower_bound is not None:
            # below this value the gradient of the bound is ill-conditioned, and at 0 it is defined as 0
            keep = lower_bound >= 1e-3
            a, b = a[keep], b[keep]
        assert a.isfinite().all(), name
        assert relative_error(a, b) <= ceiling, name


def hand_on(chain: int):
    """Return a hand_on function for sequences of `chain` consecutive pieces that are all in this process."""

    def start(state, log_decay, reverse):
        assert state.shape[:3] == log_decay.shape[:3]
        pieces = [x.unflatten(0, (-1, chain)).transpose(0, 1) for x in (state, log_decay)]
        if reverse:
            pieces = [x.flip(0) for x in pieces]
        entering, _ = combine_states(*pieces)
        if reverse:
            entering = entering.flip(0)
        return lambda: entering.transpose(0, 1).flatten(0, 1)

    return start


def capture_without_waiting(step):
    """Return a CUDA graph of step, and the results that it fills. Raise an error if step waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured
