"""A forward that walks the chunks once, and its mirror for the backward, in Gluon for Hopper.

A program has two groups of warps. One group makes the operands of a chunk (gates, queries, keys) one chunk ahead. The
other group holds the state [K, V] in registers and computes the products. Formulas and roundings are the same as in
mode "kv" of fused_forward.py.
"""

import torch
from fused_forward import C, D
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

LOG2E = gl.constexpr(1.4426950408889634)
LIMIT, BANDS, UNIT = gl.constexpr(96.0), gl.constexpr(4), gl.constexpr(512.0)


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate(x, b):
    """Turn raw gates and lower bounds into (g, k), as triton_math.gate does for 16-bit operands."""
    e = exp2(gl.maximum(x * LOG2E, -125.0))
    r = reciprocal(1.0 + e)
    k = (1.0 - b) * r
    series = k * (-LOG2E - k * (0.5 * LOG2E))
    return gl.where(k < 0.0078125, series, log2((b + e) * r)), k


@gluon.jit
def load_fq(q, f, row, c_q, q_s, f_s, full, C: gl.constexpr, K: gl.constexpr, pred=True):
    mbarrier.expect(full, 4 * C * K, pred=pred)
    tma.async_copy_global_to_shared(f, [row, c_q], full, f_s, pred=pred)
    tma.async_copy_global_to_shared(q, [row, c_q], full, q_s, pred=pred)


@gluon.jit
def load_y(y, row, c_y, y_s, full, C: gl.constexpr, V: gl.constexpr, pred=True):
    mbarrier.expect(full, 2 * C * V, pred=pred)
    tma.async_copy_global_to_shared(y, [row, c_y], full, y_s, pred=pred)


@gluon.jit
def make_operands(
    q,
    f,
    bound,
    bands,
    q_s,
    f_s,
    qd_s,
    kd_s,
    half_s,
    eye_s,
    sums_s,
    fq_full,
    op_full,
    op_empty,
    inverse_scale,
    begin,
    NT,
    i_h,
    c_q,
    H: gl.constexpr,
    K: gl.constexpr,
    C: gl.constexpr,
    REVERSE: gl.constexpr,
    CHECK: gl.constexpr,
):
    """Make qd and kd [K, C] of each chunk, in bf16 in the frame of its middle, and the factors of the state, half_s."""
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    o_k = gl.arange(0, K, layout=by_row)
    last = (gl.arange(0, C, layout=gl.SliceLayout(0, tile)) == C - 1)[None, :]
    b = gl.load(bound + i_h * K + o_k)
    zero = gl.zeros([K, C], gl.float32, tile)
    for n in range(NT):
        slot = n % 2
        phase = (n // 2) & 1
        chunk = begin + (NT - 1 - n if REVERSE else n)
        mbarrier.wait(fq_full.index(slot), phase)
        x = warpgroup_mma(f_s.index(slot).permute((1, 0)), eye_s, zero, use_acc=False)
        g, k = gate(x, b[:, None])
        units = gl.convert_layout((g * UNIT).to(gl.float16), left)
        e = warpgroup_mma(units, sums_s, zero, use_acc=False)
        middle = gl.sum(gl.where(last, e, 0.0), 1)
        if CHECK:
            framed = gl.maximum(middle, -LIMIT)
            beyond = middle - framed
            needed = ((1.5 - 2.0 * middle) * (0.5 / LIMIT)).to(gl.int32) + 1
            at_bands = bands + (chunk * H + i_h) * (K // 64) + o_k // 64
            gl.atomic_max(at_bands, gl.minimum(needed, BANDS + 1), mask=needed > 1, sem="relaxed")
            half = exp2(framed)
            up = (e + beyond[:, None]) if REVERSE else e
            down = -e if REVERSE else (beyond[:, None] - e)
        else:
            half = exp2(middle)
            up = e
            down = -e
        kd = (k * exp2(down)).to(gl.bfloat16)
        mbarrier.wait(op_empty.index(slot), phase ^ 1)
        half_s.index(2 * slot).store(half)
        if CHECK:
            half_s.index(2 * slot + 1).store(exp2(2.0 * beyond))
        kd_s.index(slot).store(kd)
        x = warpgroup_mma(q_s.index(slot).permute((1, 0)), eye_s, zero, use_acc=False)
        a = x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))
        qd_s.index(slot).store((a * exp2(up)).to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(op_full.index(slot), count=1)
        # all warps have read q and f
        row = (chunk - 2 if REVERSE else chunk + 2) * C
        load_fq(q, f, row, c_q, q_s.index(slot), f_s.index(slot), fq_full.index(slot), C, K, pred=n + 2 < NT)


@gluon.jit
def walk(
    y,
    states,
    o,
    first,
    y_s,
    h_s,
    p_s,
    qd_s,
    kd_s,
    half_s,
    y_full,
    op_full,
    op_empty,
    begin,
    NT,
    i_s,
    i_h,
    c_y,
    c_o,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    REVERSE: gl.constexpr,
    HAS_FIRST: gl.constexpr,
    STATES: gl.constexpr,
    CHECK: gl.constexpr,
):
    """Compute the products of one chunk after the other: store the state, store o, and step the state."""
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, whole)
    i = gl.arange(0, C, layout=gl.SliceLayout(1, square))[:, None]
    j = gl.arange(0, C, layout=gl.SliceLayout(0, square))[None, :]
    # scores are [reader, writer], and a reader sees the writers up to itself
    seen = i <= j if REVERSE else i >= j
    out_zero = gl.zeros([C, V], gl.float32, wide)
    scores_zero = gl.zeros([C, C], gl.float32, square)
    state = gl.zeros([K, V], gl.float32, whole)
    if HAS_FIRST:
        o_k = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        state = gl.load(first + (i_s.to(gl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :])
    for n in range(NT):
        slot = n % 2
        phase = (n // 2) & 1
        chunk = begin + (NT - 1 - n if REVERSE else n)
        mbarrier.wait(op_full.index(slot), phase)
        if REVERSE:
            reader = kd_s.index(slot)
            writer = qd_s.index(slot)
        else:
            reader = qd_s.index(slot)
            writer = kd_s.index(slot)
        scores = warpgroup_mma(reader.permute((1, 0)), writer, scores_zero, use_acc=False, is_async=True)
        half = half_s.index(2 * slot).load(by_row)
        state = state * half[:, None]
        if STATES:
            # the previous store of a state has read h_s; the store of o may still be running
            tma.store_wait(1)
            gl.thread_barrier()
        h_s.store(state.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        if STATES:
            tma.async_copy_shared_to_global(states, [(chunk * H + i_h) * K, 0], h_s)
        out = warpgroup_mma(reader.permute((1, 0)), h_s, out_zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        p_s.store(gl.where(seen, scores, 0.0).to(gl.bfloat16))
        if CHECK:
            beyond = half_s.index(2 * slot + 1).load(by_row)
            state = state * beyond[:, None]
        fence_async_shared()
        # the previous store of o has read its slot, which receives the next v
        tma.store_wait(1 if STATES else 0)
        gl.thread_barrier()
        later = chunk - 1 if REVERSE else chunk + 1
        load_y(y, later * C, c_y, y_s.index(1 - slot), y_full.index(1 - slot), C, V, pred=n + 1 < NT)
        mbarrier.wait(y_full.index(slot), phase)
        out = warpgroup_mma(p_s, y_s.index(slot), out, is_async=True)
        state = warpgroup_mma(writer, y_s.index(slot), state, is_async=True)
        out, state = warpgroup_mma_wait(num_outstanding=0, deps=[out, state])
        # all warps have read the operands and v, whose slot receives o
        gl.thread_barrier()
        mbarrier.arrive(op_empty.index(slot), count=1)
        y_s.index(slot).store(out.to(gl.bfloat16))
        state = state * half[:, None]
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(o, [chunk * C, c_o], y_s.index(slot))
    tma.store_wait(0)


@gluon.jit
def specialised_kernel(
    q,  # [B T, H K] raw queries: a descriptor, as are f, y (v, or do where REVERSE), states and o
    f,
    y,
    states,  # [chunks H K, V] bf16, out where STATES
    o,  # [B T, H V], out
    bound,  # [H, K] fp32
    first,  # [segments, H, K, V] fp32, read where HAS_FIRST
    bands,  # [chunks, H, K / 64] int32, filled with 1; out where CHECK
    sums,
    ones,
    stride_qh,
    stride_yh,
    stride_oh,
    inverse_scale,
    NT,  # chunks per segment
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    REVERSE: gl.constexpr,
    HAS_FIRST: gl.constexpr,
    STATES: gl.constexpr,
    CHECK: gl.constexpr,
    REGS: gl.constexpr,
):
    """Run the forward of one (segment, head) with 8 warps for products and 8 for gates."""
    i_h = gl.program_id(0) % H
    i_s = gl.program_id(0) // H
    begin = i_s * NT
    c_q = i_h * stride_qh
    c_y = i_h * stride_yh
    c_o = i_h * stride_oh
    DT: gl.constexpr = gl.bfloat16
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    f_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    y_s = gl.allocate_shared_memory(DT, [2, C, V], swizzled)
    qd_s = gl.allocate_shared_memory(DT, [2, K, C], swizzled)
    kd_s = gl.allocate_shared_memory(DT, [2, K, C], swizzled)
    h_s = gl.allocate_shared_memory(DT, [K, V], swizzled)
    p_s = gl.allocate_shared_memory(DT, [C, C], swizzled)
    half_s = gl.allocate_shared_memory(gl.float32, [4, K], plain)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    i = gl.arange(0, C, layout=gl.SliceLayout(1, rows))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, rows))
    at = i[:, None] * C + j[None, :]
    eye_s = gl.allocate_shared_memory(DT, [C, C], swizzled, gl.load(ones + at))
    sums_s = gl.allocate_shared_memory(gl.float16, [C, C], swizzled, gl.load(sums + at))
    fence_async_shared()
    fq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    y_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    op_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    op_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(fq_full.index(n), count=1)
        mbarrier.init(y_full.index(n), count=1)
        mbarrier.init(op_full.index(n), count=1)
        mbarrier.init(op_empty.index(n), count=1)
    gl.thread_barrier()
    # NT is at least 2
    row0 = (begin + NT - 1 if REVERSE else begin) * C
    row1 = row0 - C if REVERSE else row0 + C
    load_fq(q, f, row0, c_q, q_s.index(0), f_s.index(0), fq_full.index(0), C, K)
    load_fq(q, f, row1, c_q, q_s.index(1), f_s.index(1), fq_full.index(1), C, K)
    load_y(y, row0, c_y, y_s.index(0), y_full.index(0), C, V)
    # fmt: off
    gl.warp_specialize(
        [
            (walk, (
                y, states, o, first, y_s, h_s, p_s, qd_s, kd_s, half_s, y_full, op_full, op_empty,
                begin, NT, i_s, i_h, c_y, c_o, H, K, V, C, REVERSE, HAS_FIRST, STATES, CHECK,
            )),
            (make_operands, (
                q, f, bound, bands, q_s, f_s, qd_s, kd_s, half_s, eye_s, sums_s, fq_full, op_full, op_empty,
                inverse_scale, begin, NT, i_h, c_q, H, K, C, REVERSE, CHECK,
            )),
        ],
        [8],
        [REGS],
    )
    # fmt: on


def launch(problem, variant, o, states):
    """Return a function that launches the kernel for a Variant of fused_forward.py and returns the compiled kernel."""
    p, H = problem, problem.H
    y = p.do if variant.reverse else p.v
    first = p.first[variant.reverse]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def rows(x):
        shape = [x.shape[0] * x.shape[1], (H - 1) * x.stride(2) + D]
        return TensorDescriptor(x, shape, [x.stride(1), 1], [C, D], layout)

    flat = TensorDescriptor(states, [states.numel() // D, D], [D, 1], [D, D], layout)
    arguments = (
        *(rows(p.q), rows(p.f), rows(y), flat, rows(o)),
        *(p.bound, p.bound if first is None else first, p.bands, p.sums, p.ones),
        *(p.q.stride(2), y.stride(2), o.stride(2), D**0.5, p.length),
    )
    constants = dict(
        H=H,
        K=D,
        V=D,
        C=C,
        REVERSE=variant.reverse,
        HAS_FIRST=first is not None,
        STATES=variant.states,
        CHECK=variant.check,
        REGS=variant.regs,
        num_warps=8,
    )
    assert p.dtype == torch.bfloat16 and p.length >= 2
    return lambda: specialised_kernel[(p.segments * H,)](*arguments, **constants)
