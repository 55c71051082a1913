"""The backward in one pass over the chunks in reverse, for Hopper: dv, dq, df and the bound's gradient.

One program a (segment, head) has two groups of warps with a role each, as in hopper_forward.py: one makes the operands
of a chunk, the other holds the gradient of the state [K, V] in registers, does the products, and makes dq and df of
them. The formulas are those of chunk_gradient's fast form.

What a chunk writes to the gradient of the state is right for every gate, as the state in hopper_forward.py. For a chunk
beyond the fast limit the gradient of the state is stored, the bound's gets nothing on the channels that are beyond, and
what is stored of dv, dq and df is written again by chunk_output and chunk_gradient.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hgrn2_kernels.hopper_math import (
    LIMIT,
    LOG2E,
    UNIT,
    bound_of,
    exp2,
    fetch,
    gate,
    reciprocal,
    segment_of,
    silu,
    store,
)


@gluon.jit
def here(x_s, n: gl.constexpr = 0):
    """Tile n of x_s, at an address that the compiler cannot make ahead of a loop, at the cost of registers."""
    n = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [gl.to_tensor(n)], gl.int32, is_pure=False, pack=1)
    return x_s.index(n)


@gluon.jit
def fetch_state(states, place, x_s, full, BYTES: gl.constexpr, pred=True):
    mbarrier.expect(full, BYTES, pred=pred)
    tma.async_copy_global_to_shared(states, [place, 0], full, x_s, pred=pred)


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
    i_h,
    t,
    end,
    steps,
    K: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    FULL: gl.constexpr,
):
    """Make each chunk's qd and kd [K, C], bf16 in the frame of its middle, log gates [K, C] fp16, state factors."""
    # a block of 64 channels lies by itself, in a tile [K, C] as in one [C, K]
    B: gl.constexpr = 64
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks: gl.constexpr = K // B
    q_s = q_s._reinterpret(gl.bfloat16, [2 * blocks, C, B], swizzled)
    f_s = f_s._reinterpret(gl.bfloat16, [2 * blocks, C, B], swizzled)
    qd_s = qd_s._reinterpret(gl.bfloat16, [blocks, B, C], swizzled)
    kd_s = kd_s._reinterpret(gl.bfloat16, [blocks, B, C], swizzled)
    units_s = units_s._reinterpret(gl.float16, [blocks, B, C], swizzled)
    half_s = half_s._reinterpret(gl.float32, [2 * blocks, B], plain)
    o_k = gl.arange(0, B, layout=by_row)
    o_c = gl.arange(0, C, layout=gl.SliceLayout(0, tile))
    last = (o_c == C - 1)[None, :]
    for n in range(steps):
        slot = n % 2
        mbarrier.wait(fq_full.index(slot), (n // 2) & 1)
        for block in range(blocks):
            b = bound_of(bound, i_h * K + block * B + o_k, BOUNDED, by_row)
            zero = gl.zeros([B, C], gl.float32, tile)
            x = warpgroup_mma(f_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            g, k = gate(x, b[:, None])
            if not FULL:
                # tokens that are not there decay nothing
                g = gl.where((o_c < end - t - (steps - 1 - n) * C)[None, :], g, 0.0)
            units = (g * UNIT).to(gl.float16)
            e = warpgroup_mma(gl.convert_layout(units, left), here(sums_s), zero, use_acc=False)
            middle = gl.sum(gl.where(last, e, 0.0), 1)
            framed = gl.maximum(middle, -LIMIT)
            beyond = middle - framed
            kd = (k * exp2(-e)).to(gl.bfloat16)
            # of the second block at once: there is one arrival a chunk
            mbarrier.wait(op_empty, (n & 1) ^ 1)
            half_s.index(block).store(exp2(framed))
            half_s.index(blocks + block).store(exp2(2.0 * beyond))
            kd_s.index(block).store(kd)
            units_s.index(block).store(units)
            x = warpgroup_mma(q_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            qd_s.index(block).store((silu(x, inverse_scale) * exp2(e + beyond[:, None])).to(gl.bfloat16))
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
    dstates,
    dv,
    dq,
    df,
    bound,
    first,
    final,
    bands,
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
    i_s,
    i_h,
    line,
    t,
    end,
    begin,
    steps,
    NC,
    parts,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    HAS_FIRST: gl.constexpr,
    LAST: gl.constexpr,
    PACKED: gl.constexpr,
    FULL: gl.constexpr,
):
    """Products of a chunk after the other, and dv, dq and df."""
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
    b = bound_of(bound, i_h * K + o_k, BOUNDED, by_row_c)
    db_sum = gl.zeros([K], gl.float32, by_row_c)
    state = gl.zeros([K, V], gl.float32, whole)
    if HAS_FIRST:
        o_r = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        state = gl.load(first + (i_s.to(gl.int64) * H + i_h) * K * V + o_r[:, None] * V + o_v[None, :])
    for n in range(steps):
        slot = n % 2
        phase = n & 1
        chunk = begin + steps - 1 - n
        row = t + (steps - 1 - n) * C
        more = n + 1 < steps
        tile_zero = gl.zeros([K, C], gl.float32, tile)
        square_zero = gl.zeros([C, C], gl.float32, square)
        mbarrier.wait(op_full, phase)
        half = here(half_s).load(by_row)
        state = state * half[:, None]
        stored = state.to(gl.bfloat16)
        mbarrier.wait(h_full, phase)
        # gradient of the chunk's total decay, through the state that passes it
        passing = gl.sum(here(h_s).load(whole).to(gl.float32) * stored.to(gl.float32), 1)
        mbarrier.wait(do_full, phase)
        mbarrier.wait(v_full, phase)
        q_sum = warpgroup_mma(here(h_s), here(do_s).permute((1, 0)), tile_zero, use_acc=False, is_async=True)
        dscores = warpgroup_mma(here(do_s), here(v_s).permute((1, 0)), square_zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(here(kd_s).permute((1, 0)), here(qd_s), square_zero, use_acc=False, is_async=True)
        q_sum, dscores, scores = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, dscores, scores])
        # stores of dq and df of the chunk before have read their slots
        tma.store_wait(0)
        gl.thread_barrier()
        # [reader, writer] of dv, and [query, key]: entries on the other side may be infinite, and are chosen away
        here(p_s).store(gl.where(i <= j, scores, 0.0).to(gl.bfloat16))
        here(d_s).store(gl.where(i >= j, dscores, 0.0).to(gl.bfloat16))
        # in the place of the states, which all warps have read
        here(h_s).store(stored)
        fence_async_shared()
        gl.thread_barrier()
        at_bands = bands + (chunk * H + i_h) * (K // 64)
        n_bands = gl.load(at_bands)
        n_bands = gl.maximum(n_bands, gl.load(at_bands + 1))
        if n_bands > 0:
            tma.async_copy_shared_to_global(dstates, [(chunk * H + i_h) * K, 0], here(h_s))
        again = (n > 0) & more
        fetch(f, line, row - C, end, i_h, f_s.index(1 - slot), fq_full.index(1 - slot), 4 * C * K, PACKED, again)
        fetch(q, line, row - C, end, i_h, q_s.index(1 - slot), fq_full.index(1 - slot), 0, PACKED, again)
        # what it decays by beyond the limit; ready long ago
        state = state * here(half_s, 1).load(by_row)[:, None]
        q_sum = warpgroup_mma(here(kd_s), here(d_s).permute((1, 0)), q_sum, is_async=True)
        state = warpgroup_mma(here(qd_s), here(do_s), state, is_async=True)
        out = gl.zeros([C, V], gl.float32, wide)
        out = warpgroup_mma(here(kd_s).permute((1, 0)), here(h_s), out, use_acc=False, is_async=True)
        out = warpgroup_mma(here(p_s), here(do_s), out, is_async=True)
        q_sum, state, out = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, state, out])
        # all warps are done with do, whose slot takes dv
        gl.thread_barrier()
        here(do_s).store(out.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        store(dv, line, row, end, i_h, here(do_s), PACKED)
        state = state * half[:, None]
        balance = here(qd_s).load(tile).to(gl.float32) * q_sum
        e = warpgroup_mma(here(units_s), here(sums_s), tile_zero, use_acc=False)
        q_sum = q_sum * exp2(e)
        x = warpgroup_mma(q_s.index(slot).permute((1, 0)), here(eye_s), tile_zero, use_acc=False)
        s = reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))
        b_dq = (q_sum * s * (1.0 + x * (1.0 - s * inverse_scale))).to(gl.bfloat16)
        # all warps have read q, and dv's store its slot, which takes the next do
        tma.store_wait(0)
        gl.thread_barrier()
        fetch(do, line, row - C, end, i_h, here(do_s), do_full, 2 * C * V, PACKED, more)
        q_s.index(slot).permute((1, 0)).store(b_dq)
        fence_async_shared()
        gl.thread_barrier()
        store(dq, line, row, end, i_h, q_s.index(slot), PACKED)
        k_sum = warpgroup_mma(here(h_s), here(v_s).permute((1, 0)), tile_zero, use_acc=False)
        # all that is written, from which balance takes what is written after a gate
        written = gl.sum(here(kd_s).load(tile).to(gl.float32) * k_sum, 1)
        k_sum = warpgroup_mma(here(qd_s), here(d_s), k_sum)
        k_dk = here(kd_s).load(tile).to(gl.float32) * k_sum
        balance -= k_dk
        # all warps are done with the operands, v and the states
        gl.thread_barrier()
        mbarrier.arrive(op_empty, count=1)
        fetch_state(states, ((chunk - 1) * H + i_h) * K, here(h_s), h_full, 2 * K * V, more)
        fetch(v, line, row - C, end, i_h, here(v_s), v_full, 2 * C * V, PACKED, more)
        # two numbers of bf16 are nearly one of fp32
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
        if BOUNDED:
            db = dg * share - k_dk * reciprocal(1.0 - b)[:, None]
            if not FULL:
                o_c = gl.arange(0, C, layout=gl.SliceLayout(0, tile))
                db = gl.where((o_c < end - row)[None, :], db, 0.0)
            # chosen, not multiplied: beyond the limit they may be infinite
            within = gl.load(at_bands + o_k // 64) == 0
            db_sum += gl.where(within, gl.sum(db, 1), 0.0)
        # all warps have read f
        gl.thread_barrier()
        f_s.index(slot).permute((1, 0)).store(b_df.to(gl.bfloat16))
        fence_async_shared()
        gl.thread_barrier()
        store(df, line, row, end, i_h, f_s.index(slot), PACKED)
    if BOUNDED:
        at = (i_h * K + o_k).to(gl.int64) * NC + parts + i_s
        gl.store(dbound + at, gl.where(b > 0, db_sum, 0.0))
    if LAST:
        l_k = gl.arange(0, K, layout=by_row)
        l_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        gl.store(final + (i_s.to(gl.int64) * H + i_h) * K * V + l_k[:, None] * V + l_v[None, :], state)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "NT", "NC", "parts", "SEGMENTS", "LENGTH"])
def hopper_backward_kernel(
    q,  # [B, T, H, K] bf16 raw: a descriptor, see hopper.py, as all down to df but the states
    f,  # raw gate
    v,
    do,
    states,  # [chunks H K, V] bf16: a descriptor: the state entering each chunk, framed
    dstates,  # the same, out for chunks beyond the limit: gradient of the state leaving the chunk, framed
    dv,  # out
    dq,  # out
    df,  # out
    bound,  # [H, K] fp32, read where BOUNDED
    first,  # [segments, H, K, V] fp32: gradient of the state after the segment, read where HAS_FIRST
    final,  # [segments, H, K, V] fp32, out where LAST: gradient of the state before the segment
    bands,  # [chunks, H, K / 64] int32, of the forward
    dbound,  # [H, K, NC] fp32, out where BOUNDED: of segment n at parts + n
    sums,
    ones,
    cu_seqlens,
    chunk_first,
    segment_sequence,  # read where TABLED
    segment_first,
    inverse_scale,
    T,
    NT,
    NC,
    parts,
    SEGMENTS,  # of a sequence, where not TABLED
    LENGTH,  # chunks of a segment
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    HAS_FIRST: gl.constexpr,
    LAST: gl.constexpr,
    PACKED: gl.constexpr,
    TABLED: gl.constexpr,
    FULL: gl.constexpr,
    REGS: gl.constexpr,  # registers of a thread that makes operands
):
    """One program a (segment, head): 8 warps of products and gradients, and 4 of gates."""
    i_h = gl.program_id(0) % H
    i_s = gl.program_id(0) // H
    line, t, end, begin, steps = segment_of(
        i_s, cu_seqlens, chunk_first, segment_sequence, segment_first, T, NT, SEGMENTS, LENGTH, C, PACKED, TABLED
    )
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
    half_s = gl.allocate_shared_memory(gl.float32, [2, K], plain)
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
    last = t + (steps - 1) * C
    for n in gl.static_range(2):
        fetch(f, line, last - n * C, end, i_h, f_s.index(n), fq_full.index(n), 4 * C * K, PACKED, n < steps)
        fetch(q, line, last - n * C, end, i_h, q_s.index(n), fq_full.index(n), 0, PACKED, n < steps)
        if n == 0:
            fetch_state(states, ((begin + steps - 1) * H + i_h) * K, h_s.index(0), h_full, 2 * K * V, steps > 0)
            fetch(do, line, last, end, i_h, do_s.index(0), do_full, 2 * C * V, PACKED, steps > 0)
            fetch(v, line, last, end, i_h, v_s.index(0), v_full, 2 * C * V, PACKED, steps > 0)
    # fmt: off
    gl.warp_specialize(
        [
            (walk, (
                q, f, v, do, states, dstates, dv, dq, df, bound, first, final, bands, dbound,
                q_s, f_s, v_s, do_s, h_s, qd_s, kd_s, units_s, p_s, d_s, half_s, eye_s, sums_s, from_s,
                fq_full, v_full, do_full, h_full, op_full, op_empty, inverse_scale, i_s, i_h, line, t, end, begin,
                steps, NC, parts, H, K, V, C, BOUNDED, HAS_FIRST, LAST, PACKED, FULL,
            )),
            (make_operands, (
                bound, q_s, f_s, qd_s, kd_s, units_s, half_s, eye_s, sums_s, fq_full, op_full, op_empty,
                inverse_scale, i_h, t, end, steps, K, C, BOUNDED, FULL,
            )),
        ],
        [4],
        [REGS],
    )
    # fmt: on
