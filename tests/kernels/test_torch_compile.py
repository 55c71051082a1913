"""Every public operator under torch.compile: results and gradients of eager PyTorch, and graphs that were made."""

import pytest
import torch
from operator_cases import bounds, hand_on, relative_error
from torch._dynamo.testing import CompileCounterWithBackend

from hgrn2_kernels import (
    Pieces,
    chunk_hgrn2,
    chunk_hgrn2_fused,
    chunk_hgrn2_pytorch,
    chunk_hgrn2_sharded,
    combine_states,
    op,
    shard_states,
    step_hgrn2,
)
from hgrn2_kernels import step as step_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K = 16
# whole chunks and a cut one: a chunk that is copied whole, or to where it lies, may come back as the same tensor
SHAPES = [(1, 16, 1), (2, 64, 1), (2, 40, 2)]
# what runs: the PyTorch form on the host; the kernels, in Triton's interpreter where there is no GPU; each on a GPU
FORMS = ["pytorch", "triton", *(pytest.param(x, marks=pytest.mark.gpu) for x in ("gpu-fp64", "gpu-pytorch", "gpu"))]


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    # the CPU mode of Megatron's loop turns it off, for the whole process
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


@pytest.fixture(params=FORMS)
def place(request, monkeypatch):
    """Device and dtype of the inputs; the operators take the form."""
    if request.param == "triton" and DEVICE == "cpu":
        monkeypatch.setattr(op, "implementation", lambda *where: "triton")
        from hgrn2_kernels.step_kernel import launch_step

        monkeypatch.setattr(step_module, "_step", launch_step)
    if request.param == "gpu-pytorch":
        monkeypatch.setattr(op, "implementation", lambda *where: "pytorch")
    device = "cpu" if request.param == "pytorch" else DEVICE
    return {"device": device, "dtype": torch.float64 if request.param == "gpu-fp64" else torch.float32}


def make_inputs(B, T, H, place, N=None):
    """q, f, v [B, T, H, K], a bound, and states of N sequences."""
    torch.manual_seed(0)
    q, f, v = torch.randn(3, B, T, H, K).to(**place)
    return q, f, v, bounds("learned", H, K).to(**place), torch.randn(N or B, H, K, K).to(**place)


def run(function, inputs):
    """Results of the function and gradients of a sum of theirs in which each number has another weight."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    total = sum((x * torch.linspace(0.5, 1.5, x.numel()).to(x).view(x.shape)).sum() for x in results)
    return [*(x.detach() for x in results), *torch.autograd.grad(total, leaves)]


def check(function, inputs, backend, breaks=False):
    """The function compiled, in one graph unless it `breaks`, against the function."""
    counter = CompileCounterWithBackend(backend)
    got = run(torch.compile(function, backend=counter, fullgraph=not breaks), inputs)
    assert counter.frame_count > 1 if breaks else counter.frame_count == 1
    for x, want in zip(got, run(function, inputs), strict=True):
        assert want.any() and relative_error(x, want) <= 1e-6


def backends(*cases):
    """Return every case with a backend that also traces the backward, and the last case with one that does not."""
    return [(*case, "aot_eager") for case in cases] + [(*cases[-1], "eager")]


def both(o, final_state):
    """Graphs have something before and behind the operator."""
    return o.sin(), final_state.sin()


@pytest.mark.parametrize(("B", "T", "H", "backend"), backends(*SHAPES))
def test_chunk(B, T, H, backend, place):
    *inputs, _ = make_inputs(B, T, H, place)
    check(lambda *x: [chunk_hgrn2(*x)[0].sin()], inputs, backend)


@pytest.mark.parametrize(
    ("packed", "save_states", "backend"), backends((False, False), (False, True), (True, False), (True, True))
)
def test_chunk_with_all_there_is(packed, save_states, backend, place):
    inputs = make_inputs(1, 40, 1, place, N=2 if packed else 1)
    cu_seqlens = torch.tensor([0, 7, 39], dtype=torch.int32, device=place["device"]) if packed else None
    options = dict(output_final_state=True, cu_seqlens=cu_seqlens, save_states=save_states, scale=0.7)
    check(lambda *x: both(*chunk_hgrn2(*x[:4], initial_state=x[4], **options)), inputs, backend)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_by_name_in_pytorch(backend, place):
    inputs = make_inputs(1, 16, 1, place)
    check(
        lambda *x: both(*chunk_hgrn2_pytorch(*x[:4], initial_state=x[4], output_final_state=True)), inputs, backend
    )  # fmt: skip


@pytest.mark.parametrize(("B", "T", "H", "backend"), backends(*SHAPES))
def test_fused(B, T, H, backend, place):
    q, f, v, b, _ = make_inputs(B, T, H, place)
    check(lambda qfv, b: [chunk_hgrn2_fused(qfv, b)[0].sin()], (torch.stack((q, f, v), 3), b), backend)


@pytest.mark.parametrize(
    ("B", "T", "H", "packed", "backend"), backends((1, 16, 1, False), (2, 40, 2, False), (1, 40, 1, True))
)
def test_segments(B, T, H, packed, backend, place):
    _, f, v, b, _ = make_inputs(B, T, H, place)
    cu_seqlens = torch.tensor([0, 7, 39], dtype=torch.int32, device=place["device"]) if packed else None

    def function(f, v, b):
        state, log_decay = shard_states(f, v, b, cu_seqlens=cu_seqlens)
        entering, final = combine_states(state[None].expand(3, *state.shape), log_decay[None].expand(3, -1, -1, -1))
        return entering, final, log_decay

    check(function, (f, v, b), backend)


@pytest.mark.parametrize(("packed", "backend"), backends((False,), (True,)))
def test_sharded(packed, backend, place):
    q, f, v, b, _ = make_inputs(1 if packed else 2, 40, 1, place)
    pieces = None
    if packed:
        ends = torch.tensor([0, 1, -1], dtype=torch.int32, device=place["device"])
        pieces = Pieces(torch.tensor([0, 20, 35, 40], dtype=torch.int32, device=place["device"]), ends, ends, 2)
    # its callback is anything, so the graph breaks there
    check(
        lambda qfv, b: [chunk_hgrn2_sharded(2 * qfv, b, hand_on(2), pieces=pieces).sin()],
        (torch.stack((q, f, v), 3), b), backend, breaks=True,
    )  # fmt: skip


@pytest.mark.parametrize(("H", "slots", "backend"), backends((1, None), (2, None), (1, [0, -1, 3]), (2, [0, -1, 3])))
def test_step(H, slots, backend, place):
    q, f, v, b, state = make_inputs(3 if slots else 1, 2, H, place, N=4 if slots else 1)
    slots = slots and torch.tensor(slots, device=place["device"])
    counter = CompileCounterWithBackend(backend)
    results = []
    for step in (step_hgrn2, torch.compile(step_hgrn2, backend=counter, fullgraph=True)):
        after = state.clone()
        results.append((step(q, f, v, b, after, slots), after))
    assert counter.frame_count == 1 and not torch.equal(results[0][1], state)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_inductor(place):
    q, f, v, b, first = make_inputs(1, 40, 1, place, N=2)
    cu_seqlens = torch.tensor([0, 7, 39], dtype=torch.int32, device=place["device"])
    options = dict(output_final_state=True, cu_seqlens=cu_seqlens)

    def function(q, f, v, b, first):
        o = chunk_hgrn2(q[:, :16], f[:, :16], v[:, :16], b)[0].sin()
        state, _ = shard_states(f, v, b)
        return o, state, *both(*chunk_hgrn2(q, f, v, b, initial_state=first, **options))

    check(function, (q, f, v, b, first), "inductor")


def test_lengths_that_change(place):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *x: [chunk_hgrn2(*x)[0].sin()], backend=counter, fullgraph=True)
    for T in (16, 24, 70, 33):
        *inputs, _ = make_inputs(1, T, 1, place)
        got, want = run(compiled, inputs), run(lambda *x: [chunk_hgrn2(*x)[0].sin()], inputs)
        assert all(relative_error(x, y) <= 1e-6 for x, y in zip(got, want, strict=True))
    # one length, then any
    assert counter.frame_count == 2


@pytest.mark.parametrize("name", ["chunk", "shard_states", "step"])
def test_what_torch_knows_of_an_operator_is_true(name, place):
    """Schema, fake tensors, autograd registration and tracing, as torch checks them."""
    q, f, v, b, state = (x.requires_grad_() for x in make_inputs(1, 40, 1, place))
    kernels = op.implementation(q.device, q.dtype) == "triton"
    cu_seqlens = torch.tensor([0, 40], dtype=torch.int32, device=place["device"])
    arguments = {
        "chunk": (q, f, v, b, state, cu_seqlens, 0.25, False, kernels),
        "shard_states": (f, v, b, cu_seqlens),
        "step": (*(x.detach() for x in (q, f, v, b, state)), cu_seqlens[:1], 0.25),
    }
    torch.library.opcheck(getattr(torch.ops.hgrn2, name).default, arguments[name])
