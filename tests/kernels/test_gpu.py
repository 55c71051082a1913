"""chunk_hgrn2 on a GPU: the kernels behind the public call, and what PyTorch users do with it."""

import os
import subprocess
import sys
import time

import pytest
import torch
from operator_cases import GATES, bounds, capture_without_waiting, make_inputs, relative_error, run
from torch.utils.checkpoint import checkpoint

from hgrn2_kernels import chunk_hgrn2, chunk_hgrn2_pytorch
from hgrn2_kernels.checks import check_kernels

pytestmark = pytest.mark.gpu
NAMES = ("o", "dq", "df", "dv", "dlower_bound")
CEILING = dict(zip(NAMES, (3e-3, 4e-3, 4e-3, 3e-3, 4e-3), strict=True))


def cuda_inputs(B, T, H, D=128, gate="plain", bound="half-zero"):
    """q, f, v as views of one projection in bf16, bound, do; on the GPU, where drawing large shapes is quick."""
    torch.manual_seed(0)
    fused = torch.randn(B, T, H, 3, D, device="cuda", dtype=torch.bfloat16)
    fused[..., 1, :] = GATES[gate](fused[..., 1, :].float())
    b = bounds(bound, H, D).float().cuda()
    return [*fused.unbind(3), b, torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)]


def gradients(op, q, f, v, b, do):
    leaves = [x.detach().requires_grad_() for x in (q, f, v, b)]
    o, _ = op(*leaves)
    o.backward(do)
    return dict(zip(NAMES, (o.detach(), *(x.grad for x in leaves)), strict=True))


def check(inputs, **kwargs):
    """bf16 kernels against PyTorch in fp32 on the same numbers."""
    got = gradients(lambda *x: chunk_hgrn2(*x, **kwargs), *inputs)
    *wide, b, do = inputs
    want = gradients(lambda *x: chunk_hgrn2_pytorch(*x, **kwargs), *(x.float() for x in wide), b, do.float())
    for name in NAMES:
        keep = b >= 1e-3 if name == "dlower_bound" else ...
        assert relative_error(got[name][keep], want[name][keep]) <= CEILING[name], name


@pytest.mark.parametrize("gate", ["plain", "times-16", "mixed", "closed-now-and-then"])
def test_a_large_shape(gate):
    check(cuda_inputs(4, 4096, 8, gate=gate))


def test_a_long_sequence_in_segments():
    check(cuda_inputs(1, 16384 + 5, 2, gate="over-16"))


def test_thousands_of_packed_documents():
    lengths = torch.randint(0, 40, (2000,), generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    check(cuda_inputs(1, sum(lengths.tolist()), 2, gate="mixed"), cu_seqlens=cu_seqlens.cuda())


def test_tensors_that_lie_anywhere_in_memory():
    """The same shapes and strides, one number further: a kernel compiled for aligned tensors may not take them."""
    q, f, v, b, do = cuda_inputs(1, 100, 2, 64)
    room = q.new_empty(1, 100, 2 * 64 + 1)
    apart = [room.new_empty(room.shape)[..., 1:].unflatten(-1, (2, 64)) for _ in range(3)]
    near = [room.new_empty(room.shape)[..., :-1].unflatten(-1, (2, 64)) for _ in range(3)]
    want = gradients(chunk_hgrn2, q, f, v, b, do)
    for views in (near, apart, near):
        for x, y in zip(views, (q, f, v), strict=True):
            x.copy_(y)
        got = gradients(chunk_hgrn2, *views, b, do)
        assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_torch_compile_traces_it_whole():
    inputs = cuda_inputs(1, 100, 2, 64)
    compiled = torch.compile(lambda *x: chunk_hgrn2(*x), fullgraph=True)
    got, want = gradients(compiled, *inputs), gradients(chunk_hgrn2, *inputs)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


def test_activation_checkpointing():
    inputs = cuda_inputs(1, 100, 2, 64)
    got = gradients(lambda *x: checkpoint(chunk_hgrn2, *x, use_reentrant=False), *inputs)
    want = gradients(chunk_hgrn2, *inputs)
    assert all(torch.equal(got[name], want[name]) for name in NAMES)


@pytest.mark.parametrize("packed", [False, True])
def test_cuda_graph_replays_other_numbers_without_waiting_for_the_device(packed):
    q, f, v, b, do = cuda_inputs(1, 200, 2, 64)
    cu_seqlens = torch.tensor([0, 70, 200], dtype=torch.int32, device="cuda") if packed else None
    leaves = [x.detach().clone().requires_grad_() for x in (q, f, v, b)]

    def step():
        o, _ = chunk_hgrn2(*leaves, cu_seqlens=cu_seqlens)
        return o, *torch.autograd.grad(o, leaves, do)

    graph, captured = capture_without_waiting(step)
    # gates so strong that other chunks take the exact form
    with torch.no_grad():
        leaves[1].mul_(16)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_reads_no_memory_it_has_not_written(packed):
    inputs = cuda_inputs(1, 300, 3, 80, gate="mixed")
    cu_seqlens = torch.tensor([0, 0, 5, 70, 71, 300], dtype=torch.int32, device="cuda") if packed else None

    def op(*x):
        return chunk_hgrn2(*x, cu_seqlens=cu_seqlens)

    want = gradients(op, *inputs)
    # what the allocator hands out next
    poison = [torch.full((n,), torch.nan, device="cuda") for n in (2**10, 2**14, 2**18, 2**20, 2**22, 2**24)]
    del poison
    got = gradients(op, *inputs)
    for name in NAMES:
        assert got[name].isfinite().all() and torch.equal(got[name], want[name]), name


def test_wide_heads_are_refused_by_name():
    with pytest.raises(ValueError, match="chunk_hgrn2_pytorch"):
        chunk_hgrn2(*cuda_inputs(1, 8, 1, 512)[:4])
    check_kernels(*(torch.empty(1, 8, 1, 256, device="cuda"),) * 2)


def test_fp64_is_the_recurrence():
    inputs = [x.cuda() for x in make_inputs((1, 70, 1, 16, 16))]
    assert run(chunk_hgrn2, inputs)["o"].dtype == torch.float64


START = """
import torch
from hgrn2_kernels import chunk_hgrn2
x = torch.randn(2, 256, 4, 3, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
b = torch.rand(4, 128, device="cuda", requires_grad=True)
chunk_hgrn2(*x.unbind(3), b)[0].sum().backward()
torch.cuda.synchronize()
"""


def test_first_use_compiles_within_thirty_seconds(tmp_path):
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", START], env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}, check=True)
    assert time.monotonic() - start <= 30
