"""Every stride of every kernel where an index times it passes 2^31, over memory that is reserved and hardly touched.

An offset that wraps around in 32 bits stays inside that memory, where it finds zeros. The results are then wrong, but
the process does not crash. On the CPU all tensors of a program are spread along an axis at once, because Triton's
interpreter is slow. On a GPU each tensor is also spread alone.
"""

import functools
import importlib
import pkgutil

import pytest
import torch
from operator_cases import hand_on, make_inputs, relative_error

import hgrn2_kernels
from hgrn2_kernels import beyond_triton, chunk_triton, shard_states_triton, sharded_triton, step_kernel
from hgrn2_kernels.checks import capability
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.launch import Launch
from hgrn2_kernels.strides import dense_like, unit_stride

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
K = 16
# numbers below a tensor's first and above it, and how far apart the first elements of two tensors lie
ROOM, MARGIN, GAP = 2**31, 2**25, 2**20
# axis: a shape [B, T, H], and how far apart the elements along that axis are; along time, so
# that the kernels take it as it is, and so far that they copy first
AXES = {
    "b": ((3, 5, 1), 2**30 + 64),
    "t": ((1, 70, 1), 2**25 - 64),
    "t-wide": ((1, 32, 1), 2**26 + 2**23),
    "h": ((1, 5, 3), 2**30 + 64),
    # of the step, which takes one token after the other
    "t-step": ((1, 3, 1), 2**30 + 64),
}


def chunk(q, f, v, do, o, dq, df, dv):
    b, first, dlast = others(q)
    inputs = Inputs(q, f, v, b, first, None, 1.0)
    kept, last, _ = chunk_triton.chunk_forward(inputs)
    run = chunk_triton.Launches(*(unit_stride(x) for x in (q, f, v)), b, 1.0, None)
    v_near = unit_stride(v)
    run.output(v_near, run.states(v_near, first)[0], o)
    *_, dbound, dfirst = chunk_triton.chunk_backward(do, dlast, inputs, into=(dq, df, dv))
    return kept, last, o, dq, df, dv, dbound, dfirst


def beyond(q, f, v, do, o, dq, df, dv):
    """The kernels for chunks beyond the fast limit, with gates so strong that all chunks are."""
    b, first, dlast = others(q)
    q, f, v, do = (unit_stride(x) for x in (q, f, v, do))
    whole = chunk_triton.Launches(q, f, v, b, 1.0, None)
    states, dstates = whole.states(v, first)[0], whole.states(do, dlast, reverse=True)[0]
    run = beyond_triton.BeyondLaunches(q, f, v, b, 1.0, None, whole.bands)
    run.lists(gradients=True)
    run.output(v, states, o)
    run.output(do, dstates, dv, reverse=True)
    dbound = run.gradients(v, do, states, dstates, dq, df)
    return o, dq, df, dv, dbound


def on_hopper(q, f, v, do, o, dq, df, dv):
    """The kernels for Hopper, for heads of 128 in bf16."""
    from hgrn2_kernels import hopper

    b, first, dlast = others(q)
    inputs = Inputs(q, f, v, b, first, None, 1.0)
    kept, last, saved = hopper.chunk_forward(inputs, True, True)
    run = hopper.HopperLaunches(*(hopper.by_tma(x) for x in (q, f, v)), b, 1.0, None)
    run.run_forward(hopper.by_tma(v), first, o)
    *_, dbound, dfirst = hopper.chunk_backward(do, dlast, inputs, saved, into=(dq, df, dv))
    return kept, last, o, dq, df, dv, dbound, dfirst


def step(q, f, v, state):
    slots = torch.arange(len(q), device=q.device).flip(0)
    return step_kernel.launch_step(q, f, v, others(q)[0], state, slots, 1.0), state


def shards(f, v):
    b, _, dstate = others(f)
    sums = shard_states_triton.forward(f, v, b, None)
    return *sums, *shard_states_triton.backward(dstate, dstate[..., 0], f, v, b, None)


def sharded(qfv, do, dqfv):
    b, *_ = others(do)
    inputs = Inputs(*qfv.unbind(3), b, None, None, 1.0)
    o, entering = sharded_triton.forward(inputs, hand_on(1), None)
    dbound = sharded_triton.backward(do, inputs, entering, hand_on(1), None, dqfv.unbind(3))
    return o, entering, dqfv, dbound


def others(q):
    """A bound, a state and the gradient of one."""
    B, _, H, _ = q.shape
    D = q.shape[-1]
    *_, b, first = make_inputs((B, 1, H, D, D), bound="half-zero", dtype=torch.float32)
    return b.to(DEVICE), first.to(DEVICE), first.flip(0).contiguous().to(DEVICE)


CASES = {
    chunk: {
        **dict.fromkeys(("q", "f", "v", "do"), ("b", "t", "t-wide", "h")),
        **dict.fromkeys(("o", "dq", "df", "dv"), ("b", "t", "h")),
    },
    beyond: dict.fromkeys(("q", "f", "v", "do", "o", "dq", "df", "dv"), ("b", "t", "h")),
    on_hopper: {
        **dict.fromkeys(("q", "f", "v", "do"), ("b", "t", "t-wide", "h")),
        **dict.fromkeys(("o", "dq", "df", "dv"), ("b", "t", "h")),
    },
    step: {**dict.fromkeys(("q", "f", "v"), ("b", "t-step", "h")), "state": ("b",)},
    # the same kernels
    shards: dict.fromkeys(("f", "v"), ("t-wide", "h")),
    sharded: {**dict.fromkeys(("qfv", "do"), ("t-wide", "h")), "dqfv": ("h",)},
}
ALONE = [(program, (name,), axis) for program, names in CASES.items() for name, axes in names.items() for axis in axes]
TOGETHER = [
    (program, tuple(name for name, axes in names.items() if axis in axes), axis)
    for program, names in CASES.items()
    for axis in AXES
    if any(axis in axes for axes in names.values())
]


def tensors(program, axis, dtype):
    """Contiguous tensors of the program by name."""
    (B, T, H), _ = AXES[axis]
    torch.manual_seed(0)
    shapes = {name: (B, T, H, 128 if program is on_hopper else K) for name in CASES[program]}
    shapes |= {name: (B, T, H, 3, K) for name in ("qfv", "dqfv") if name in shapes}
    given = {name: torch.randn(shape).to(DEVICE, dtype) for name, shape in shapes.items()}
    if program is beyond:
        given["f"] *= 60
    return given | ({"state": torch.randn(B, H, K, K).to(DEVICE)} if "state" in given else {})


@functools.cache
def near(program, axis, dtype):
    return program(**tensors(program, axis, dtype))


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """Numbers of a dtype, which on the host take no memory before they are written: those of a file full of holes."""
    kept = {}

    def of(dtype):
        if dtype not in kept:
            kept.clear()
            count = 2 * ROOM + MARGIN * 8
            if DEVICE == "cuda":
                kept[dtype] = torch.zeros(count, dtype=dtype, device=DEVICE)
            else:
                path = tmp_path_factory.mktemp("memory") / "holes"
                kept[dtype] = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        return kept[dtype]

    yield of
    kept.clear()


def spread(x, axis, memory, place):
    """Return x with its elements along an axis far apart, so that wrapped offsets stay in the memory.

    Tensors at different places share no element: `GAP` is larger than any tensor, and far smaller than a stride.
    """
    stride = list(x.stride())
    stride["bth".index(axis[0])] = AXES[axis][1]
    far = memory(x.dtype).as_strided(x.shape, stride, ROOM + MARGIN + place * GAP)
    far.copy_(x)
    return far


def far(program, names, axis, dtype, memory):
    """Return the results of the program with the named tensors spread along an axis."""
    given = tensors(program, axis, dtype)
    return program(**given | {name: spread(given[name], axis, memory, place) for place, name in enumerate(names)})


def label(x):
    return "-".join(x) if isinstance(x, tuple) else getattr(x, "__name__", x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("program", "names", "axis"),
    [
        *(pytest.param(*case, marks=pytest.mark.gpu if case[0] is on_hopper else ()) for case in TOGETHER),
        *(pytest.param(*case, marks=pytest.mark.gpu) for case in ALONE),
    ],
    ids=label,
)
def test_elements_far_apart_are_as_good_as_near(program, names, axis, dtype, memory):
    if program is on_hopper and (dtype != torch.bfloat16 or capability(torch.device(DEVICE)) != (9, 0)):
        pytest.skip("needs a Hopper GPU and bf16")
    for got, want in zip(far(program, names, axis, dtype, memory), near(program, axis, dtype), strict=True):
        assert relative_error(got, want) <= 1e-6


def test_every_stride_of_every_kernel_is_tried(memory, monkeypatch):
    tried = set()

    def record(launch, *given):
        numbers = dict(zip(launch.jitted.arg_names[len(given) :], launch.numbers, strict=True))
        tried.update((launch.jitted.__name__, name) for name, x in numbers.items() if x == AXES[axis][1])

    monkeypatch.setattr(Launch, "__call__", record)
    for program, names, axis in TOGETHER:
        if program is on_hopper:
            # its own kernels take descriptors and no strides
            continue
        far(program, names, axis, torch.float32, memory)
    assert tried == {(kernel.__name__, name) for kernel in kernels() for name in kernel.arg_names if "stride" in name}


def test_what_the_kernels_write_lies_within_their_reach():
    # so many short sequences side by side, as Megatron keeps activations, that 64 tokens are 2^31 numbers apart
    x = torch.empty(32, 2**17, 4, 3, 64, dtype=torch.bfloat16, device="meta").transpose(0, 1)
    assert x.stride(1) > 2**26 and dense_like(x).stride() == x.contiguous().stride()
    assert dense_like(x[: 2**10]).transpose(0, 1).is_contiguous()


def kernels():
    """Every kernel of the package. The module for fla has none, and needs fla."""
    for module in pkgutil.iter_modules(hgrn2_kernels.__path__):
        if module.name == "for_fla":
            continue
        for name, x in vars(importlib.import_module(f"hgrn2_kernels.{module.name}")).items():
            if name.endswith("_kernel") and hasattr(x, "arg_names"):
                yield x
