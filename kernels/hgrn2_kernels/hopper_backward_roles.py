"""The roles of the two groups of warps in hopper_backward.py: `make_operands` and `walk`.

The formulas are the same as in the fast form of chunk_forms.py and chunk_gradient.py.
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
    async_load,
    async_store,
    barrier,
    exp2,
    fetch,
    gate,
    load_bound,
    load_initial,
    reciprocal,
    reinterpret,
    silu,
    store,
)


@gluon.jit
def here(x_s, n: gl.constexpr = 0):
    """Return tile n of x_s, without letting the compiler compute its address before a loop, which costs registers."""
    n = gl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [gl.to_tensor(n)], gl.int32, is_pure=False, pack=1)
    return x_s.index(n)


@gluon.jit
def fetch_state(states, o_row, x_s, full, BYTES: gl.constexpr, pred=True):
    """Fetch the state that starts at row o_row into x_s."""
    mbarrier.expect(full, BYTES, pred=pred)
    async_load(states, [o_row, 0], full, x_s, pred=pred)


@gluon.jit
def load_counts(bands, i_c, i_h, H: gl.constexpr):
    """Return the counts of bands of the two blocks of channels of chunk i_c."""
    p_bands = bands + (i_c * H + i_h) * 2
    return gl.load(p_bands), gl.load(p_bands + 1)


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
    n_chunks,
    K: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    FULL: gl.constexpr,
):
    """Make the operands of each chunk: qd and kd [K, C] in bf16 in the frame of its middle, and its log gates.

    It also makes the factors of the state, half_s.
    """
    # each block of 64 channels is contiguous, both in a tile [K, C] and in a tile [C, K]
    B: gl.constexpr = 64
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    blocks: gl.constexpr = K // B
    q_s = reinterpret(q_s, gl.bfloat16, [2 * blocks, C, B], swizzled)
    f_s = reinterpret(f_s, gl.bfloat16, [2 * blocks, C, B], swizzled)
    qd_s = reinterpret(qd_s, gl.bfloat16, [blocks, B, C], swizzled)
    kd_s = reinterpret(kd_s, gl.bfloat16, [blocks, B, C], swizzled)
    units_s = reinterpret(units_s, gl.float16, [blocks, B, C], swizzled)
    half_s = reinterpret(half_s, gl.float32, [2 * blocks, B], plain)
    o_k = gl.arange(0, B, layout=by_row)
    o_t = gl.arange(0, C, layout=gl.SliceLayout(0, tile))
    m_last = (o_t == C - 1)[None, :]
    for n in range(n_chunks):
        slot = n % 2
        mbarrier.wait(fq_full.index(slot), (n // 2) & 1)
        for block in range(blocks):
            b_bound = load_bound(bound, i_h * K + block * B + o_k, BOUNDED, by_row)
            zero = gl.zeros([B, C], gl.float32, tile)
            x = warpgroup_mma(f_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            g, k = gate(x, b_bound[:, None])
            if not FULL:
                # tokens that do not exist decay nothing
                g = gl.where((o_t < end - t - (n_chunks - 1 - n) * C)[None, :], g, 0.0)
            units = (g * UNIT).to(gl.float16)
            e = warpgroup_mma(gl.convert_layout(units, operand), here(sums_s), zero, use_acc=False)
            middle = gl.sum(gl.where(m_last, e, 0.0), 1)
            framed = gl.maximum(middle, -LIMIT)
            beyond = middle - framed
            kd = (k * exp2(-e)).to(gl.bfloat16)
            # the second block does not wait here, because op_empty gets one arrival per chunk
            mbarrier.wait(op_empty, (n & 1) ^ 1)
            half_s.index(block).store(exp2(framed))
            half_s.index(blocks + block).store(exp2(2.0 * beyond))
            kd_s.index(block).store(kd)
            units_s.index(block).store(units)
            x = warpgroup_mma(q_s.index(slot * blocks + block).permute((1, 0)), here(eye_s), zero, use_acc=False)
            qd_s.index(block).store((silu(x, inverse_scale) * exp2(e + beyond[:, None])).to(gl.bfloat16))
        fence_async_shared()
        barrier()
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
    initial,
    initial_rows,
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
    passing_s,
    passed_s,
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
    i_b,
    t,
    end,
    i_first,
    n_chunks,
    NC,
    parts,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    ROWS: gl.constexpr,
    FINAL: gl.constexpr,
    PACKED: gl.constexpr,
    FULL: gl.constexpr,
):
    """Compute the products of one chunk after the other, and dv, dq and df."""
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V, 16])
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, whole)
    by_row_c: gl.constexpr = gl.SliceLayout(1, tile)
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, square))[:, None]
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, square))[None, :]
    o_k = gl.arange(0, K, layout=by_row_c)
    b_bound = load_bound(bound, i_h * K + o_k, BOUNDED, by_row_c)
    db_sum = gl.zeros([K], gl.float32, by_row_c)
    state = gl.zeros([K, V], gl.float32, whole)
    if HAS_INITIAL:
        o_r = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        state = load_initial(initial, initial_rows, i_s, i_h, o_r[:, None] * V + o_v[None, :], H, K * V, ROWS)
    # The counts of bands of a chunk's two blocks of channels are loaded one chunk ahead. An empty segment may lie after
    # all chunks.
    lower, upper = load_counts(bands, gl.where(n_chunks > 0, i_first + n_chunks - 1, 0), i_h, H)
    for n in range(n_chunks):
        slot = n % 2
        phase = n & 1
        i_c = i_first + n_chunks - 1 - n
        start = t + (n_chunks - 1 - n) * C
        more = n + 1 < n_chunks
        tile_zero = gl.zeros([K, C], gl.float32, tile)
        square_zero = gl.zeros([C, C], gl.float32, square)
        mbarrier.wait(op_full, phase)
        half = here(half_s).load(by_row)
        state = state * half[:, None]
        stored = state.to(gl.bfloat16)
        mbarrier.wait(h_full, phase)
        if gl.minimum(lower, upper) > 1:
            # the launches over the list compute all gradients of this chunk, which only steps the state
            mbarrier.wait(do_full, phase)
            mbarrier.wait(v_full, phase)
            # the stores of dq and df of the previous chunk have read their slots
            tma.store_wait(0)
            barrier()
            here(h_s).store(stored)
            fence_async_shared()
            barrier()
            async_store(dstates, [(i_c * H + i_h) * K, 0], here(h_s))
            again = (n > 0) & more
            fetch(f, i_b, start - C, end, i_h, f_s.index(1 - slot), fq_full.index(1 - slot), 4 * C * K, PACKED, again)
            fetch(q, i_b, start - C, end, i_h, q_s.index(1 - slot), fq_full.index(1 - slot), 0, PACKED, again)
            state = state * here(half_s, 1).load(by_row)[:, None]
            state = warpgroup_mma(here(qd_s), here(do_s), state, is_async=True)
            state = warpgroup_mma_wait(num_outstanding=0, deps=[state])
            state = state * half[:, None]
            # all warps have read the operands and do, and the store of the gradient has read its slot
            tma.store_wait(0)
            barrier()
            mbarrier.arrive(op_empty, count=1)
            fetch(do, i_b, start - C, end, i_h, here(do_s), do_full, 2 * C * V, PACKED, more)
            fetch_state(states, ((i_c - 1) * H + i_h) * K, here(h_s), h_full, 2 * K * V, more)
            fetch(v, i_b, start - C, end, i_h, here(v_s), v_full, 2 * C * V, PACKED, more)
        else:
            # the gradient of the total decay of the chunk, through the state that passes it
            passing = gl.sum(here(h_s).load(whole).to(gl.float32) * stored.to(gl.float32), 1)
            here(passing_s).store(gl.convert_layout(passing, by_row_c))
            mbarrier.wait(do_full, phase)
            mbarrier.wait(v_full, phase)
            q_sum = warpgroup_mma(here(h_s), here(do_s).permute((1, 0)), tile_zero, use_acc=False, is_async=True)
            dscores = warpgroup_mma(here(do_s), here(v_s).permute((1, 0)), square_zero, use_acc=False, is_async=True)
            scores = warpgroup_mma(here(kd_s).permute((1, 0)), here(qd_s), square_zero, use_acc=False, is_async=True)
            q_sum, dscores, scores = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, dscores, scores])
            # the stores of dq and df of the previous chunk have read their slots
            tma.store_wait(0)
            barrier()
            # p_s is [reader, writer] and is for dv, d_s is [query, key]. Entries on the other side of the diagonal may
            # be infinite, so they are replaced.
            here(p_s).store(gl.where(o_i <= o_j, scores, 0.0).to(gl.bfloat16))
            here(d_s).store(gl.where(o_i >= o_j, dscores, 0.0).to(gl.bfloat16))
            # this overwrites the state of the forward, which all warps have read
            here(h_s).store(stored)
            fence_async_shared()
            barrier()
            if gl.maximum(lower, upper) > 1:
                async_store(dstates, [(i_c * H + i_h) * K, 0], here(h_s))
            again = (n > 0) & more
            fetch(f, i_b, start - C, end, i_h, f_s.index(1 - slot), fq_full.index(1 - slot), 4 * C * K, PACKED, again)
            fetch(q, i_b, start - C, end, i_h, q_s.index(1 - slot), fq_full.index(1 - slot), 0, PACKED, again)
            # the decay beyond the limit, which the other warps stored together with `half`
            state = state * here(half_s, 1).load(by_row)[:, None]
            q_sum = warpgroup_mma(here(kd_s), here(d_s).permute((1, 0)), q_sum, is_async=True)
            state = warpgroup_mma(here(qd_s), here(do_s), state, is_async=True)
            out = gl.zeros([C, V], gl.float32, wide)
            out = warpgroup_mma(here(kd_s).permute((1, 0)), here(h_s), out, use_acc=False, is_async=True)
            out = warpgroup_mma(here(p_s), here(do_s), out, is_async=True)
            q_sum, state, out = warpgroup_mma_wait(num_outstanding=0, deps=[q_sum, state, out])
            # all warps have read do, whose slot receives dv
            barrier()
            here(do_s).store(out.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            store(dv, i_b, start, end, i_h, here(do_s), PACKED)
            state = state * half[:, None]
            balance = here(qd_s).load(tile).to(gl.float32) * q_sum
            e = warpgroup_mma(here(units_s), here(sums_s), tile_zero, use_acc=False)
            q_sum = q_sum * exp2(e)
            x = warpgroup_mma(q_s.index(slot).permute((1, 0)), here(eye_s), tile_zero, use_acc=False)
            s = reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))
            b_dq = (q_sum * s * (1.0 + x * (1.0 - s * inverse_scale))).to(gl.bfloat16)
            # all warps have read q, and the store of dv has read its slot, which receives the next do
            tma.store_wait(0)
            barrier()
            fetch(do, i_b, start - C, end, i_h, here(do_s), do_full, 2 * C * V, PACKED, more)
            q_s.index(slot).permute((1, 0)).store(b_dq)
            fence_async_shared()
            barrier()
            store(dq, i_b, start, end, i_h, q_s.index(slot), PACKED)
            k_sum = warpgroup_mma(here(h_s), here(v_s).permute((1, 0)), tile_zero, use_acc=False)
            # The sum of all writes. The balance, summed from a gate on, subtracts the writes after that gate.
            written = gl.sum(here(kd_s).load(tile).to(gl.float32) * k_sum, 1)
            k_sum = warpgroup_mma(here(qd_s), here(d_s), k_sum)
            k_dk = here(kd_s).load(tile).to(gl.float32) * k_sum
            balance -= k_dk
            # The sum is stored here because ptxas would otherwise add it up where it is used, and keep its 16 terms in
            # registers until then.
            here(passed_s).store(here(passing_s).load(by_row_c) + written)
            # all warps have read the operands, v and the states
            barrier()
            mbarrier.arrive(op_empty, count=1)
            fetch_state(states, ((i_c - 1) * H + i_h) * K, here(h_s), h_full, 2 * K * V, more)
            fetch(v, i_b, start - C, end, i_h, here(v_s), v_full, 2 * C * V, PACKED, more)
            # two numbers in bf16 are nearly as precise as one in fp32
            hi = balance.to(gl.bfloat16)
            lo = (balance - hi.to(gl.float32)).to(gl.bfloat16)
            dg = warpgroup_mma(gl.convert_layout(hi, operand), here(from_s), tile_zero, use_acc=False)
            dg = warpgroup_mma(gl.convert_layout(lo, operand), here(from_s), dg)
            dg = dg + here(passed_s).load(by_row_c)[:, None]
            x = warpgroup_mma(f_s.index(slot).permute((1, 0)), here(eye_s), tile_zero, use_acc=False)
            e = exp2(gl.minimum(gl.maximum(x * LOG2E, -125.0), 125.0))
            r = reciprocal(1.0 + e)
            share = reciprocal(b_bound[:, None] + e)
            b_df = (1.0 - b_bound[:, None]) * r * (dg * (e * share)) - k_dk * (e * r)
            if BOUNDED:
                db = dg * share - k_dk * reciprocal(1.0 - b_bound)[:, None]
                if not FULL:
                    o_t = gl.arange(0, C, layout=gl.SliceLayout(0, tile))
                    db = gl.where((o_t < end - start)[None, :], db, 0.0)
                # selected and not multiplied by 0, because beyond the limit they may be infinite
                within = gl.where(o_k < 64, lower, upper) <= 1
                db_sum += gl.where(within, gl.sum(db, 1), 0.0)
            # all warps have read f
            barrier()
            f_s.index(slot).permute((1, 0)).store(b_df.to(gl.bfloat16))
            fence_async_shared()
            barrier()
            store(df, i_b, start, end, i_h, f_s.index(slot), PACKED)
        lower, upper = load_counts(bands, gl.maximum(i_c - 1, 0), i_h, H)
    if BOUNDED:
        at = (i_h * K + o_k).to(gl.int64) * NC + parts + i_s
        gl.store(dbound + at, gl.where(b_bound > 0, db_sum, 0.0))
    if FINAL:
        o_k = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        gl.store(final + (i_s.to(gl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :], state)
    tma.store_wait(0)
