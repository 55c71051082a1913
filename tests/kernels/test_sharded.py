"""chunk_hgrn2_sharded where this process has every piece, against the float64 recurrence over the whole sequences."""

import pytest
import torch
from operator_cases import CEILING, GATES, bounds, hand_on, relative_error

from hgrn2_kernels import (
    Ends,
    Pieces,
    chunk_hgrn2_sharded,
    chunk_plan,
    op,
    recurrent_hgrn2,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("o", "dqfv", "dlower_bound")


def make_inputs(B, T, H, K, gate="plain", bound="half-zero", dtype=torch.float64):
    torch.manual_seed(0)
    qfv = torch.randn(B, T, H, 3, K, dtype=torch.float64)
    qfv[..., 1, :] = GATES[gate](qfv[..., 1, :])
    b = bounds(bound, H, K)
    do = torch.randn(B, T, H, K, dtype=torch.float64)
    return [x if x is None else x.to(DEVICE, dtype) for x in (qfv, b, do)]


def run(op, qfv, b, do, dtype=None):
    leaves = [x if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in (qfv, b)]
    o = op(*leaves)
    o.backward(do.to(o.dtype))
    return dict(zip(NAMES, (o.detach(), *(None if x is None else x.grad for x in leaves)), strict=True))


def whole(cu_seqlens=None):
    return lambda qfv, b: recurrent_hgrn2(*qfv.unbind(-2), b, cu_seqlens=cu_seqlens)[0]


def assert_equal(got, want, ceiling, b):
    for name in NAMES:
        if want[name] is None:
            assert got[name] is None
            continue
        keep = b > 0 if name == "dlower_bound" else ...
        assert got[name].isfinite().all(), name
        assert relative_error(got[name][keep], want[name][keep]) <= ceiling, name


@pytest.fixture(params=["pytorch-fp64", "pytorch-fp32", "triton"])
def dtype(request, monkeypatch):
    """The dtype of the inputs. For fp32 there is a case with the Triton kernels as well."""
    if request.param == "triton":
        monkeypatch.setattr(op, "implementation", lambda *where: "triton")
    elif DEVICE == "cuda":
        monkeypatch.setattr(op, "implementation", lambda *where: "pytorch")
    return torch.float64 if request.param == "pytorch-fp64" else torch.float32


@pytest.mark.parametrize("gate", ["plain", "over-256", "all-closed", "mixed"])
def test_rows_of_the_batch_are_pieces_of_one_sequence(gate, dtype):
    qfv, b, do = make_inputs(4, 33, 2, 16, gate, dtype=dtype)

    def op(qfv, b):
        return chunk_hgrn2_sharded(qfv, b, hand_on(4))

    def one(qfv, b):
        return whole()(qfv.flatten(0, 1)[None], b).view(qfv.shape[0], -1, *qfv.shape[2:3], qfv.shape[4])

    want = run(one, qfv, b, do, torch.float64)
    assert_equal(run(op, qfv, b, do), want, CEILING[dtype], b)


def test_no_bound(dtype):
    qfv, _, do = make_inputs(2, 20, 1, 16, bound="none", dtype=dtype)
    got = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(1)), qfv, None, do)
    assert_equal(got, run(whole(), qfv, None, do, torch.float64), CEILING[dtype], None)


def test_long_pieces_are_cut_into_segments(dtype, monkeypatch):
    monkeypatch.setattr(chunk_plan, "FILL", 6)
    qfv, b, do = make_inputs(2, 24 * 32 + 5, 1, 16, "over-16", dtype=dtype)

    def one(qfv, b):
        return whole()(qfv.flatten(0, 1)[None], b).unflatten(1, (2, -1))[0]

    got = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(2)), qfv, b, do)
    assert_equal(got, run(one, qfv, b, do, torch.float64), CEILING[dtype], b)


def ints(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def test_packed_sequences_in_two_pieces_each_and_one_that_is_whole(dtype):
    # of 30, 2 and 90 tokens, then 11 that are nobody's
    pieces = Pieces(
        cu_seqlens=ints(0, 15, 30, 31, 32, 77, 122, 133),
        entered=ints(0, 1, 2, 3, 4, 5, -1),
        left=ints(0, 1, 2, 3, 4, 5, -1),
        count=6,
    )
    qfv, b, do = make_inputs(1, 133, 2, 16, "mixed", dtype=dtype)
    got = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(2), pieces=pieces), qfv, b, do)
    want = run(whole(ints(0, 30, 32, 122, 133)), qfv, b, do, torch.float64)
    assert_equal(got, want, CEILING[dtype], b)


def test_a_stream_in_three_pieces_with_borders_anywhere(dtype):
    # pieces of 40 tokens; sequences end inside the first, at the end of the second and inside the third, twice
    pieces = Pieces(
        cu_seqlens=ints(0, 25, 40, 80, 81, 100, 120),
        entered=ints(-1, -1, 1, -1, -1, -1),
        left=ints(-1, 0, -1, -1, -1, -1),
        count=3,
        last_tokens=Ends(ints(0, 25, 40, 80, 100, 120), ints(1, 2, 4, dtype=torch.int64), stops=[0, 2]),
        first_tokens=Ends(ints(0, 25, 40, 80, 81, 120), ints(0, 2, 3, dtype=torch.int64), stops=[0, 1, 2]),
    )
    qfv, b, do = make_inputs(1, 120, 2, 16, "over-16", dtype=dtype)
    got = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(3), pieces=pieces), qfv, b, do)
    want = run(whole(ints(0, 25, 80, 81, 100, 120)), qfv, b, do, torch.float64)
    assert_equal(got, want, CEILING[dtype], b)


def test_keeps_its_inputs_and_what_enters():
    qfv, b, _ = make_inputs(2, 64, 2, 16, dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        chunk_hgrn2_sharded(qfv.requires_grad_(), b, hand_on(2))
    assert sorted(x.numel() for x in saved) == sorted([qfv.numel(), b.numel(), 2 * 2 * 16 * 16])


def test_projections_may_lie_anyhow_in_memory(dtype):
    qfv, b, do = make_inputs(2, 20, 2, 16, dtype=dtype)

    def channels_outermost(qfv, b):
        return chunk_hgrn2_sharded(qfv.movedim(-1, 0).contiguous().movedim(0, -1), b, hand_on(1))

    want = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(1)), qfv, b, do)
    assert_equal(run(channels_outermost, qfv, b, do), want, 1e-6, b)


@pytest.mark.gpu
@pytest.mark.parametrize("gate", ["plain", "times-16", "over-256"])
def test_bf16_at_128(gate):
    qfv, b, do = make_inputs(2, 2048, 4, 128, gate, dtype=torch.float32)
    qfv, do = qfv.bfloat16(), do.bfloat16()

    def one(qfv, b):
        return whole()(qfv.flatten(0, 1)[None], b).unflatten(1, (2, -1))[0]

    got = run(lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(2)), qfv, b, do)
    leaves = qfv.float(), b
    want = run(one, *leaves, do.float(), torch.float64)
    keep = b >= 1e-3
    assert relative_error(got["o"], want["o"]) <= 3e-3
    assert relative_error(got["dqfv"], want["dqfv"]) <= 4e-3
    assert relative_error(got["dlower_bound"][keep], want["dlower_bound"][keep]) <= 4e-3


@pytest.mark.parametrize("shape", [(1, 8, 2, 2, 16), (8, 2, 3, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"qfv must be \[B, T, H, 3, K\]"):
        chunk_hgrn2_sharded(torch.zeros(shape), None, hand_on(1))
