"""The decoding step in one launch. One program holds a tile of the state of one (sequence, head) in registers.

The names of variables follow triton_math.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgrn2_kernels.launch import Launch


@triton.jit
def sigmoids(x):
    """Return the sigmoids of x and of -x, both with a small relative error and without overflow."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x >= 0, 1.0, e) * r, tl.where(x >= 0, e, 1.0) * r


@triton.jit
def step_kernel(
    q,  # [N, T, H, K] raw queries
    f,  # [N, T, H, K] raw gates
    v,  # [N, T, H, V]
    bound,  # [H, K] fp32, read where BOUNDED
    state,  # [S, H, K, V] fp32, in and out; rows are stride_s apart
    slots,  # [N] int32 or int64, read where SLOTTED; negative for padding
    o,  # [N, T, H, V] contiguous, out
    stride_qn,
    stride_qt,
    stride_qh,
    stride_fn,
    stride_ft,
    stride_fh,
    stride_vn,
    stride_vt,
    stride_vh,
    stride_s,
    scale,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BOUNDED: tl.constexpr,
    SLOTTED: tl.constexpr,
):
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = ((pid // NV) % H).to(tl.int64)
    i_n = (pid // (NV * H)).to(tl.int64)
    i_slot = i_n
    if SLOTTED:
        i_slot = tl.load(slots + i_n).to(tl.int64)
    m_active = i_slot >= 0

    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    m_kv = m_k[:, None] & m_v[None, :] & m_active
    p_h = state + i_slot * stride_s + i_h * (K * V) + o_k[:, None] * V + o_v[None, :]
    # loaded first: everything else is small, and arrives while this load is on its way
    b_h = tl.load(p_h, mask=m_kv, other=0.0)
    b_bound = tl.zeros([BK], tl.float32)
    if BOUNDED:
        b_bound = tl.load(bound + i_h * K + o_k, mask=m_k, other=0.0)

    p_q = q + i_n * stride_qn + i_h * stride_qh + o_k
    p_f = f + i_n * stride_fn + i_h * stride_fh + o_k
    p_v = v + i_n * stride_vn + i_h * stride_vh + o_v
    p_o = o + (i_n * T * H + i_h) * V + o_v
    for _ in range(T):
        b_f = tl.load(p_f, mask=m_k, other=0.0).to(tl.float32)
        b_q = tl.load(p_q, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        s, s_neg = sigmoids(b_f)
        forget = b_bound + (1.0 - b_bound) * s
        k = (1.0 - b_bound) * s_neg
        # A forget gate near 1 is rounded. If it hardly changes, it is rounded in the same direction at each token, and
        # the errors add up. So h - k h takes the place of forget h there.
        m_open = k < 0.5
        factor = tl.where(m_open, -k, forget)
        kept = tl.where(m_open[:, None], b_h, 0.0)
        b_h = kept + (factor[:, None] * b_h + k[:, None] * b_v[None, :])
        s, _ = sigmoids(b_q)
        b_o = tl.sum(b_h * (b_q * s * scale)[:, None], 0)
        # the result for padding has no meaning and may be NaN
        b_o = tl.where(m_active, b_o, 0.0)
        tl.store(p_o, b_o.to(o.dtype.element_ty), mask=m_v)
        p_q += stride_qt
        p_f += stride_ft
        p_v += stride_vt
        p_o += H * V

    tl.store(p_h, b_h, mask=m_kv)


def tile(K: int, V: int) -> tuple[int, int, int]:
    """Return (BK, BV, num_warps): the rows and columns of the state that one program holds, and its warps.

    With 32 numbers per thread, eight 16-byte loads are in flight. With at least 32 columns, a row consists of whole
    cache lines.
    """
    BK = triton.next_power_of_2(K)
    BV = min(triton.next_power_of_2(V), max(32, 4096 // BK))
    return BK, BV, min(16, max(1, BK * BV // 1024))


def launch_step(
    q: Tensor, f: Tensor, v: Tensor, lower_bound: Tensor | None, state: Tensor, slots: Tensor | None, scale: float
) -> Tensor:
    """Launch `step_kernel` on arguments that `step_hgrn2` has checked. It updates state in place and returns o."""
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    # the kernel needs a tensor for each pointer, also for one that it does not read
    bound = state if lower_bound is None else lower_bound.contiguous()
    slot_dtype = None if slots is None else slots.dtype
    slots = state if slots is None else slots.contiguous()
    strides = q.stride(), f.stride(), v.stride(), state.stride(0)
    step = _step(v.device, v.dtype, slot_dtype, q.shape, v.shape[-1], strides, lower_bound is not None, scale)
    with torch.cuda.device_of(v):
        step(q, f, v, bound, state, slots, o)
    # autograd cannot see that a kernel wrote: a backward that saved this state would compute with the new one
    torch.autograd.graph.increment_version(state)
    return o


@functools.lru_cache(maxsize=1024)
def _step(device, dtype, slot_dtype, shape, V, strides, bounded, scale) -> Launch:
    """Return the launch for tensors of these shapes, dtypes and strides on a device."""
    N, T, H, K = shape
    BK, BV, num_warps = tile(K, V)
    names = [f"stride_{x}{axis}" for x in "qfv" for axis in "nth"]
    numbers = dict(zip(names, (s for stride in strides[:3] for s in stride[:3]), strict=True))
    return Launch(
        step_kernel,
        (N * H * triton.cdiv(V, BV),),
        num_warps,
        **numbers,
        stride_s=strides[3],
        scale=scale,
        T=T,
        H=H,
        K=K,
        V=V,
        BK=BK,
        BV=BV,
        BOUNDED=bounded,
        SLOTTED=slot_dtype is not None,
    )
