"""The kernels for chunks beyond the fast limit compute what the kernels for all chunks do there, and nothing else."""

import itertools

import pytest
import torch
from operator_cases import make_inputs, relative_error

from hgrn2_kernels import beyond_triton, triton_math
from hgrn2_kernels.beyond_triton import BeyondLaunches
from hgrn2_kernels.chunk_triton import Launches

# three blocks of channels in the gradient, which share two counts of bands
K = 48
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# a GPU compiles the same formulas twice, and may round differently
ERROR = 1e-6 if DEVICE == "cuda" else 0


def tokens_of(listed, run, cu_seqlens, T):
    """Return where [B, T, H, ..] the tokens of listed chunks [chunks, H, ..] are, and those after the last sequence."""
    C, chunks = run.plan.config.C, run.plan.chunks
    if cu_seqlens is None:
        return listed.unflatten(0, (chunks.N, -1)).repeat_interleave(C, 1)[:, :T]
    borders = cu_seqlens.tolist()
    tokens = listed.new_ones(1, T, *listed.shape[1:])
    starts = [(t, min(t + C, end)) for t0, end in itertools.pairwise(borders) for t in range(t0, end, C)]
    for i_c, (start, end) in enumerate(starts):
        tokens[0, start:end] = listed[i_c]
    return tokens


def all_results(launches, inputs, cu_seqlens, bands=None, into=None):
    """Return o, dv, dq, df and the gradient of the bound; what is not computed keeps the numbers of `into`."""
    q, f, v, b, h0, do, dht = inputs
    whole = Launches(q, f, v, b, 0.5, cu_seqlens)
    states, *_ = whole.states(v, h0)
    dstates, *_ = whole.states(do, dht, reverse=True)
    run = launches(q, f, v, b, 0.5, cu_seqlens, whole.bands if bands is None else bands)
    o, dv, dq, df = (torch.empty_like(v) for _ in range(4)) if into is None else into
    if launches is BeyondLaunches:
        run.lists(gradients=True)
    run.output(v, states, o)
    run.output(do, dstates, dv, reverse=True)
    dbound = run.gradients(v, do, states, dstates, dq, df)
    return run, (o, dv, dq, df), dbound


@pytest.mark.parametrize(
    ("gate", "T", "borders", "most"),
    [
        ("plain", 70, None, 1),
        ("mixed", 70, None, 1),
        ("mixed", 64, None, 4),
        ("times-4", 70, None, 4),
        ("all-closed", 33, None, 4),
        ("mixed", 110, [0, 0, 5, 37, 38, 38, 75], 1),
        ("plain", 75, [0, 5, 40], 4),
    ],
)
def test_the_same_numbers_beyond_the_limit_and_nothing_within_it(gate, T, borders, most, monkeypatch):
    if DEVICE == "cuda" and most > 1:
        pytest.skip("compiled kernels keep their constants")
    monkeypatch.setattr(triton_math, "BANDS_FP32", triton_math.tl.constexpr(most))
    # several parts of a list, and several items of a program
    monkeypatch.setattr(beyond_triton, "PROGRAMS", 3)
    if DEVICE == "cpu":
        monkeypatch.setattr(beyond_triton, "PART", 4)
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32, device=DEVICE)
    N = None if borders is None else len(borders) - 1
    inputs = [x.to(DEVICE) for x in make_inputs((1, T, 1, K, K), gate, "half-zero", N, dtype=torch.float32)]
    inputs += [torch.randn_like(inputs[2]), torch.randn_like(inputs[4])]
    whole, want, dbound = all_results(Launches, inputs, cu_seqlens)
    marked = [torch.full_like(inputs[2], torch.nan) for _ in want]
    run, got, dbound_beyond = all_results(BeyondLaunches, inputs, cu_seqlens, whole.bands, marked)

    blocks = whole.bands != 1
    chunks = blocks.any(-1)
    of_chunks = tokens_of(chunks, run, cu_seqlens, T)[..., None].expand_as(inputs[2])
    of_blocks = tokens_of(blocks.repeat_interleave(run.plan.config.BK, -1)[..., :K], run, cu_seqlens, T)
    for where, x, y in zip((of_chunks, of_chunks, of_blocks, of_blocks), got, want, strict=True):
        assert relative_error(x[where], y[where]) <= ERROR and x[~where].isnan().all()
    config = run.plan.config
    of_gradient = blocks.repeat_interleave(config.BK // config.gradient[0], -1)[..., : -(-K // config.gradient[0])]
    for listed, wanted in ((run.chunks, chunks), (run.blocks, of_gradient)):
        assert listed[1 : 1 + listed[0]].tolist() == wanted.flatten().nonzero()[:, 0].tolist()
    if blocks.all():
        assert relative_error(dbound_beyond, dbound) <= ERROR
    if not blocks.any():
        assert not dbound_beyond.any()
