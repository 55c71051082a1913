"""A backward that walks the chunks once in reverse, in Gluon for Hopper: dv, dq, df and the gradient of the bound.

A program has two groups of warps. One group makes the operands of a chunk (gates, queries, keys) one chunk ahead. The
other group holds the gradient of the state [K, V] in registers, computes the products, and makes dq and df from them.
Formulas and roundings are the same as in the fast form of chunk_gradient, and in fused_gluon.py in reverse.
"""

import torch
from fused_forward import C, D
from fused_gluon import LOG2E, UNIT, exp2, gate, reciprocal
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


@gluon.jit
def here(x_s):
    """Return the only tile of x_s, without letting the compiler compute its address before a loop and keep it."""
    zero = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [gl.to_tensor(0)], gl.int32, is_pure=False, pack=1)
    return x_s.index(zero)


@gluon.jit
def load(x, row, column, x_s, full, BYTES: gl.constexpr, pred=True):
    """Fetch a tile.

    The first fetch on a barrier passes in BYTES the number of bytes that all fetches on it bring. The others pass 0.
    """
    if BYTES > 0:
        mbarrier.expect(full, BYTES, pred=pred)
    tma.async_copy_global_to_shared(x, [row, column], full, x_s, pred=pred)


@gluon.jit
def make_operands(
    bound,
    q_s,
    f_s,
    qd_s,
    kd_s,
    units_s,
    half_s,
    eye_s,
    sums_s,
    fq_full,
    op_full,
    op_empty,
    inverse_scale,
    NT,
    i_h,
    K: gl.constexpr,
    C: gl.constexpr,
):
    """Make the operands of each chunk: qd and kd [K, C] in bf16 in the frame of its middle, and log gates in fp16.

    It also makes the factors of the state, half_s.
    """
    # each block of 64 channels is contiguous, both in a tile [K, C] and in a tile [C, K]
    B: gl.constexpr = 64
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks: gl.constexpr = K // B
    q_s = q_s._reinterpret(gl.bfloat16, [2 * blocks, C, B], swizzled)
    f_s = f_s._reinterpret(gl.bfloat16, [2 * blocks, C, B], swizzled)
    qd_s = qd_s._reinterpret(gl.bfloat16, [blocks, B, C], swizzled)
    kd_s = kd_s._reinterpret(gl.bfloat16, [blocks, B, C], swizzled)
    units_s = units_s._reinterpret(gl.float16, [blocks, B, C], swizzled)
    half_s = half_s._reinterpret(gl.float32, [blocks, B], plain)
    o_k = gl.arange(0, B, layout=gl.SliceLayout(1, tile))
    last = (gl.arange(0, C, layout=gl.SliceLayout(0, tile)) == C - 1)[None, :]
    for n in range(NT):
        slot = n % 2
        mbarrier.wait(fq_full.index(slot), (n // 2) & 1)
        for block in range(blocks):
            b = gl.load(bound + i_h * K + block * B + o_k)
            zero = gl.zeros([B, C], gl.float32, tile)
            x = warpgroup_mma(f_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            g, k = gate(x, b[:, None])
            units = (g * UNIT).to(gl.float16)
            e = warpgroup_mma(gl.convert_layout(units, left), here(sums_s), zero, use_acc=False)
            half = exp2(gl.sum(gl.where(last, e, 0.0), 1))
            kd = (k * exp2(-e)).to(gl.bfloat16)
            # the second block does not wait here, because op_empty gets one arrival per chunk
            mbarrier.wait(op_empty, (n & 1) ^ 1)
            half_s.index(block).store(half)
            kd_s.index(block).store(kd)
            units_s.index(block).store(units)
            x = warpgroup_mma(q_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            a = x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))
            qd_s.index(block).store((a * exp2(e)).to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(op_full, count=1)


@gluon.jit
def walk(
    q,
    f,
    v,
    do,
    states,
    dv,
    dq,
    df,
    bound,
    first,
    dbound,
    q_s,
    f_s,
    v_s,
    do_s,
    h_s,
    qd_s,
    kd_s,
    units_s,
    p_s,
    d_s,
    half_s,
    eye_s,
    sums_s,
    from_s,
    fq_full,
    v_full,
    do_full,
    h_full,
    op_full,
    op_empty,
    inverse_scale,
    begin,
    NT,
    SEGMENTS,
    i_s,
    i_h,
    c_q,
    c_v,
    c_do,
    c_g,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    HAS_FIRST: gl.constexpr,
):
    """Compute the products of one chunk after the other, and dv, dq and df."""
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V, 16])
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, whole)
    by_row_c: gl.constexpr = gl.SliceLayout(1, tile)
    i = gl.arange(0, C, layout=gl.SliceLayout(1, square))[:, None]
    j = gl.arange(0, C, layout=gl.SliceLayout(0, square))[None, :]
    o_k = gl.arange(0, K, layout=by_row_c)
    b = gl.load(bound + i_h * K + o_k)
    db_sum = gl.zeros([K], gl.float32, by_row_c)
    state = gl.zeros([K, V], gl.float32, whole)
    if HAS_FIRST:
        o_r = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        state = gl.load(first + (i_s.to(gl.int64) * H + i_h) * K * V + o_r[:, None] * V + o_v[None, :])
    for n in range(NT):
        slot = n % 2
        phase = n & 1
        chunk = begin + NT - 1 - n
        row = chunk * C
        tile_zero = gl.zeros([K, C], gl.float32, tile)
        square_zero = gl.zeros([C, C], gl.float32, square)
        mbarrier.wait(op_full, phase)
        half = here(half_s).load(by_row)
        state = state * half[:, None]
        stored = state.to(gl.bfloat16)
        mbarrier.wait(h_full, phase)
        # the gradient of the chunk's total decay, through the state that passes it
        passing = gl.sum(here(h_s).load(whole).to(gl.float32) * stored.to(gl.float32), 1)
        mbarrier.wait(do_full, phase)
        mbarrier.wait(v_full, phase)
        q_sum = warpgroup_mma(here(h_s), here(do_s).permute((1, 0)), tile_zero, use_acc=False, is_async=True)
        dscores = warpgroup_mma(here(do_s), here(v_s).permute((1, 0)), square_zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(here(kd_s).permute((1, 0)), here(qd_s), square_zero, use_acc=False, is_async=True)
        q_sum, dscores, scores = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, dscores, scores])
        # the stores of dq and df of the previous chunk have read their slots
        tma.store_wait(0)
        gl.thread_barrier()
        # p_s is [reader, writer] and is for dv, d_s is [query, key]. Entries on the other side of the diagonal may be
        # infinite, so they are replaced.
        here(p_s).store(gl.where(i <= j, scores, 0.0).to(gl.bfloat16))
        here(d_s).store(gl.where(i >= j, dscores, 0.0).to(gl.bfloat16))
        # this overwrites the state of the forward, which all warps have read
        here(h_s).store(stored)
        fence_async_shared()
        gl.thread_barrier()
        load(q, row - C, c_q, q_s.index(1 - slot), fq_full.index(1 - slot), 4 * C * K, (n > 0) & (n + 1 < NT))
        load(f, row - C, c_q, f_s.index(1 - slot), fq_full.index(1 - slot), 0, (n > 0) & (n + 1 < NT))
        q_sum = warpgroup_mma(here(kd_s), here(d_s).permute((1, 0)), q_sum, is_async=True)
        state = warpgroup_mma(here(qd_s), here(do_s), state, is_async=True)
        out = gl.zeros([C, V], gl.float32, wide)
        out = warpgroup_mma(here(kd_s).permute((1, 0)), here(h_s), out, use_acc=False, is_async=True)
        out = warpgroup_mma(here(p_s), here(do_s), out, is_async=True)
        q_sum, state, out = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, state, out])
        # all warps have read do, whose slot receives dv
        gl.thread_barrier()
        here(do_s).store(out.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dv, [row, c_g], here(do_s))
        state = state * half[:, None]
        balance = here(qd_s).load(tile).to(gl.float32) * q_sum
        e = warpgroup_mma(here(units_s), here(sums_s), tile_zero, use_acc=False)
        q_sum = q_sum * exp2(e)
        x = warpgroup_mma(q_s.index(slot).permute((1, 0)), here(eye_s), tile_zero, use_acc=False)
        s = reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))
        b_dq = (q_sum * s * (1.0 + x * (1.0 - s * inverse_scale))).to(gl.bfloat16)
        # all warps have read q, and the store of dv has read its slot, which receives the next do
        tma.store_wait(0)
        gl.thread_barrier()
        load(do, row - C, c_do, here(do_s), do_full, 2 * C * V, n + 1 < NT)
        q_s.index(slot).permute((1, 0)).store(b_dq)
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dq, [row, c_g], q_s.index(slot))
        k_sum = warpgroup_mma(here(h_s), here(v_s).permute((1, 0)), tile_zero, use_acc=False)
        # The sum of all writes. The balance, summed from a gate on, subtracts the writes after that gate.
        written = gl.sum(here(kd_s).load(tile).to(gl.float32) * k_sum, 1)
        k_sum = warpgroup_mma(here(qd_s), here(d_s), k_sum)
        k_dk = here(kd_s).load(tile).to(gl.float32) * k_sum
        balance -= k_dk
        # all warps have read the operands, v and the states
        gl.thread_barrier()
        mbarrier.arrive(op_empty, count=1)
        load(states, ((chunk - 1) * H + i_h) * K, 0, here(h_s), h_full, 2 * K * V, n + 1 < NT)
        load(v, row - C, c_v, here(v_s), v_full, 2 * C * V, n + 1 < NT)
        # two numbers in bf16 are nearly as precise as one in fp32
        hi = balance.to(gl.bfloat16)
        lo = (balance - hi.to(gl.float32)).to(gl.bfloat16)
        dg = warpgroup_mma(gl.convert_layout(hi, left), here(from_s), tile_zero, use_acc=False)
        dg = warpgroup_mma(gl.convert_layout(lo, left), here(from_s), dg)
        passed = gl.convert_layout(passing, by_row_c) + written
        dg = dg + passed[:, None]
        x = warpgroup_mma(f_s.index(slot).permute((1, 0)), here(eye_s), tile_zero, use_acc=False)
        e = exp2(gl.minimum(gl.maximum(x * LOG2E, -125.0), 125.0))
        r = reciprocal(1.0 + e)
        share = reciprocal(b[:, None] + e)
        b_df = (1.0 - b[:, None]) * r * (dg * (e * share)) - k_dk * (e * r)
        db_sum += gl.sum(dg * share - k_dk * reciprocal(1.0 - b)[:, None], 1)
        # all warps have read f
        gl.thread_barrier()
        f_s.index(slot).permute((1, 0)).store(b_df.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(df, [row, c_g], f_s.index(slot))
    gl.store(dbound + (i_h * K + o_k) * SEGMENTS + i_s, gl.where(b > 0, db_sum, 0.0))
    tma.store_wait(0)


@gluon.jit
def backward_specialised_kernel(
    q,  # [B T, H K] raw queries: a descriptor, as are all tensors up to df
    f,
    v,
    do,
    states,  # [chunks H K, V], the state entering each chunk, see frame in triton_math.py
    dv,  # [B T, H D], out
    dq,  # out
    df,  # out
    bound,  # [H, K] fp32
    first,  # [segments, H, K, V] fp32, read where HAS_FIRST: gradient of the state after each segment
    dbound,  # [H, K, segments] fp32, out
    sums,
    ones,
    stride_qh,
    stride_vh,
    stride_oh,
    stride_gh,
    inverse_scale,
    NT,  # chunks per segment
    SEGMENTS,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    HAS_FIRST: gl.constexpr,
    REGS: gl.constexpr,
):
    """Run the backward of one (segment, head) with 8 warps for products and gradients, and 4 for gates."""
    i_h = gl.program_id(0) % H
    i_s = gl.program_id(0) // H
    begin = i_s * NT
    c_q = i_h * stride_qh
    c_v = i_h * stride_vh
    c_do = i_h * stride_oh
    c_g = i_h * stride_gh
    DT: gl.constexpr = gl.bfloat16
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    f_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    v_s = gl.allocate_shared_memory(DT, [1, C, V], swizzled)
    do_s = gl.allocate_shared_memory(DT, [1, C, V], swizzled)
    h_s = gl.allocate_shared_memory(DT, [1, K, V], swizzled)
    qd_s = gl.allocate_shared_memory(DT, [1, K, C], swizzled)
    kd_s = gl.allocate_shared_memory(DT, [1, K, C], swizzled)
    units_s = gl.allocate_shared_memory(gl.float16, [1, K, C], swizzled)
    p_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    d_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    half_s = gl.allocate_shared_memory(gl.float32, [1, K], plain)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    i = gl.arange(0, C, layout=gl.SliceLayout(1, rows))
    j = gl.arange(0, C, layout=gl.SliceLayout(0, rows))
    at = i[:, None] * C + j[None, :]
    eye_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    eye_s.index(0).store(gl.load(ones + at))
    from_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    from_s.index(0).store(gl.load(ones + 2 * C * C + at))
    sums_s = gl.allocate_shared_memory(gl.float16, [1, C, C], swizzled)
    sums_s.index(0).store(gl.load(sums + at))
    fence_async_shared()
    fq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    h_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    op_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    op_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(fq_full.index(0), count=1)
    mbarrier.init(fq_full.index(1), count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(do_full, count=1)
    mbarrier.init(h_full, count=1)
    mbarrier.init(op_full, count=1)
    mbarrier.init(op_empty, count=1)
    gl.thread_barrier()
    # NT is at least 2
    chunk = begin + NT - 1
    row = chunk * C
    for n in gl.static_range(2):
        load(q, row - n * C, c_q, q_s.index(n), fq_full.index(n), 4 * C * K)
        load(f, row - n * C, c_q, f_s.index(n), fq_full.index(n), 0)
        if n == 0:
            load(states, (chunk * H + i_h) * K, 0, h_s.index(0), h_full, 2 * K * V)
            load(do, row, c_do, do_s.index(0), do_full, 2 * C * V)
            load(v, row, c_v, v_s.index(0), v_full, 2 * C * V)
    # fmt: off
    gl.warp_specialize(
        [
            (walk, (
                q, f, v, do, states, dv, dq, df, bound, first, dbound, q_s, f_s, v_s, do_s, h_s, qd_s, kd_s, units_s,
                p_s, d_s, half_s, eye_s, sums_s, from_s, fq_full, v_full, do_full, h_full, op_full, op_empty,
                inverse_scale, begin, NT, SEGMENTS, i_s, i_h, c_q, c_v, c_do, c_g, H, K, V, C, HAS_FIRST,
            )),
            (make_operands, (
                bound, q_s, f_s, qd_s, kd_s, units_s, half_s, eye_s, sums_s, fq_full, op_full, op_empty,
                inverse_scale, NT, i_h, K, C,
            )),
        ],
        [4],
        [REGS],
    )
    # fmt: on


def launch(problem, regs, states, out):
    """Return a function that fills dv, dq, df and dbound of `out` by the kernel and returns the compiled kernel."""
    p, H = problem, problem.H
    first = p.first[True]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)

    def rows(x):
        shape = [x.shape[0] * x.shape[1], (H - 1) * x.stride(2) + D]
        return TensorDescriptor(x, shape, [x.stride(1), 1], [C, D], layout)

    flat = TensorDescriptor(states, [states.numel() // D, D], [D, 1], [D, D], layout)
    arguments = (
        *(rows(p.q), rows(p.f), rows(p.v), rows(p.do), flat, rows(out["dv"]), rows(out["dq"]), rows(out["df"])),
        *(p.bound, p.bound if first is None else first, out["dbound"], p.sums, p.ones),
        *(p.q.stride(2), p.v.stride(2), p.do.stride(2), out["dq"].stride(2), D**0.5, p.length, p.segments),
    )
    constants = dict(H=H, K=D, V=D, C=C, HAS_FIRST=first is not None, REGS=regs, num_warps=8)
    assert p.dtype == torch.bfloat16 and p.length >= 2
    return lambda: backward_specialised_kernel[(p.segments * H,)](*arguments, **constants)
