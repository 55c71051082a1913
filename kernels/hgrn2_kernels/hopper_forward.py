"""The forward in one pass over the chunks, for Hopper: states, outputs and counts of bands.

One program computes one (segment, head). It has two groups of warps with different roles. One group makes the operands
of a chunk (gates, queries and keys) one chunk ahead, from tiles that TMA fetches. The other group holds the state
[K, V] in registers and computes the products. They exchange tiles through shared memory, and barriers signal when a
slot is full or empty.

Every chunk is computed in the frame of its middle, which is correct within the fast limit. The part of the decay beyond
the limit is counted from the end of the chunk, so states are correct for all gates. The output of a chunk beyond the
limit is not correct. `bands` tells which chunks these are, and beyond_output_kernel computes their outputs again.
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
    BANDS,
    LIMIT,
    UNIT,
    async_store,
    barrier,
    exp2,
    fetch,
    gate,
    load_bound,
    load_initial,
    segment_of,
    silu,
    store,
)


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
    i_h,
    i_b,
    t,
    end,
    i_first,
    n_chunks,
    H: gl.constexpr,
    K: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    PACKED: gl.constexpr,
    FULL: gl.constexpr,
):
    """Make qd and kd [K, C] of each chunk, in bf16 in the frame of its middle, and the factors of the state, half_s."""
    tile: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, tile, 2)
    by_row: gl.constexpr = gl.SliceLayout(1, tile)
    o_k = gl.arange(0, K, layout=by_row)
    o_t = gl.arange(0, C, layout=gl.SliceLayout(0, tile))
    m_last = (o_t == C - 1)[None, :]
    b_bound = load_bound(bound, i_h * K + o_k, BOUNDED, by_row)
    zero = gl.zeros([K, C], gl.float32, tile)
    for n in range(n_chunks):
        slot = n % 2
        phase = (n // 2) & 1
        mbarrier.wait(fq_full.index(slot), phase)
        x = warpgroup_mma(f_s.index(slot).permute((1, 0)), eye_s, zero, use_acc=False)
        g, k = gate(x, b_bound[:, None])
        if not FULL:
            # tokens that do not exist decay nothing, and they write nothing because their values are zeros
            g = gl.where((o_t < end - t - n * C)[None, :], g, 0.0)
        units = gl.convert_layout((g * UNIT).to(gl.float16), operand)
        e = warpgroup_mma(units, sums_s, zero, use_acc=False)
        middle = gl.sum(gl.where(m_last, e, 0.0), 1)
        framed = gl.maximum(middle, -LIMIT)
        beyond = middle - framed
        # as in triton_math.bands_of, for each channel; the maximum of integers is the same in any order
        needed = ((1.5 - 2.0 * middle) * (0.5 / LIMIT)).to(gl.int32) + 1
        p_bands = bands + ((i_first + n) * H + i_h) * (K // 64) + o_k // 64
        gl.atomic_max(p_bands, gl.minimum(needed, BANDS + 1), mask=needed > 1, sem="relaxed")
        kd = (k * exp2(beyond[:, None] - e)).to(gl.bfloat16)
        mbarrier.wait(op_empty.index(slot), phase ^ 1)
        half_s.index(2 * slot).store(exp2(framed))
        half_s.index(2 * slot + 1).store(exp2(2.0 * beyond))
        kd_s.index(slot).store(kd)
        x = warpgroup_mma(q_s.index(slot).permute((1, 0)), eye_s, zero, use_acc=False)
        qd_s.index(slot).store((silu(x, inverse_scale) * exp2(e)).to(gl.bfloat16))
        fence_async_shared()
        barrier()
        mbarrier.arrive(op_full.index(slot), count=1)
        # all warps have read q and f
        later = t + (n + 2) * C
        fetch(f, i_b, later, end, i_h, f_s.index(slot), fq_full.index(slot), 4 * C * K, PACKED, n + 2 < n_chunks)
        fetch(q, i_b, later, end, i_h, q_s.index(slot), fq_full.index(slot), 0, PACKED, n + 2 < n_chunks)


@gluon.jit
def walk(
    v,
    states,
    o,
    initial,
    initial_rows,
    final,
    v_s,
    h_s,
    p_s,
    qd_s,
    kd_s,
    half_s,
    v_full,
    op_full,
    op_empty,
    i_s,
    i_h,
    i_b,
    t,
    end,
    i_first,
    n_chunks,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    ROWS: gl.constexpr,
    FINAL: gl.constexpr,
    PACKED: gl.constexpr,
):
    """Compute the products of one chunk after the other: store the state, store o, and step the state."""
    whole: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, V, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, V // 2, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    by_row: gl.constexpr = gl.SliceLayout(1, whole)
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, square))[:, None]
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, square))[None, :]
    out_zero = gl.zeros([C, V], gl.float32, wide)
    scores_zero = gl.zeros([C, C], gl.float32, square)
    state = gl.zeros([K, V], gl.float32, whole)
    if HAS_INITIAL:
        o_k = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        state = load_initial(initial, initial_rows, i_s, i_h, o_k[:, None] * V + o_v[None, :], H, K * V, ROWS)
    for n in range(n_chunks):
        slot = n % 2
        phase = (n // 2) & 1
        mbarrier.wait(op_full.index(slot), phase)
        qd = qd_s.index(slot)
        kd = kd_s.index(slot)
        scores = warpgroup_mma(qd.permute((1, 0)), kd, scores_zero, use_acc=False, is_async=True)
        half = half_s.index(2 * slot).load(by_row)
        state = state * half[:, None]
        # the previous store of a state has read h_s; the store of o may still be running
        tma.store_wait(1)
        barrier()
        h_s.store(state.to(gl.bfloat16))
        fence_async_shared()
        barrier()
        async_store(states, [((i_first + n) * H + i_h) * K, 0], h_s)
        out = warpgroup_mma(qd.permute((1, 0)), h_s, out_zero, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(num_outstanding=1, deps=[scores])
        # entries on the other side of the diagonal may be infinite; they are replaced, and never multiplied by 0
        p_s.store(gl.where(o_i >= o_j, scores, 0.0).to(gl.bfloat16))
        beyond = half_s.index(2 * slot + 1).load(by_row)
        state = state * beyond[:, None]
        fence_async_shared()
        # the previous store of o has read its slot, which receives the next v
        tma.store_wait(1)
        barrier()
        other = v_s.index(1 - slot)
        fetch(v, i_b, t + (n + 1) * C, end, i_h, other, v_full.index(1 - slot), 2 * C * V, PACKED, n + 1 < n_chunks)
        mbarrier.wait(v_full.index(slot), phase)
        out = warpgroup_mma(p_s, v_s.index(slot), out, is_async=True)
        state = warpgroup_mma(kd, v_s.index(slot), state, is_async=True)
        out, state = warpgroup_mma_wait(num_outstanding=0, deps=[out, state])
        # all warps have read the operands and v, whose slot receives o
        barrier()
        mbarrier.arrive(op_empty.index(slot), count=1)
        v_s.index(slot).store(out.to(gl.bfloat16))
        state = state * half[:, None]
        fence_async_shared()
        barrier()
        store(o, i_b, t + n * C, end, i_h, v_s.index(slot), PACKED)
    if FINAL:
        o_k = gl.arange(0, K, layout=by_row)
        o_v = gl.arange(0, V, layout=gl.SliceLayout(0, whole))
        gl.store(final + (i_s.to(gl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :], state)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["T", "NT", "SEGMENTS", "LENGTH"])
def hopper_forward_kernel(
    q,  # [B, T, H, K] bf16 raw queries: a descriptor, see hopper.py, as are f, v and o
    f,  # raw gates
    v,
    states,  # [chunks H K, V] bf16: a descriptor, out: the state entering each chunk, see frame
    o,  # out
    bound,  # [H, K] fp32, read where BOUNDED
    initial,  # [segments, H, K, V] fp32: state before the segment, read where HAS_INITIAL
    initial_rows,  # [segments] int32, the row of initial that a segment takes, -1 for zeros; read where ROWS
    final,  # [segments, H, K, V] fp32, out where FINAL: state after the segment
    bands,  # [chunks, H, K / 64] int32, filled with 1 (0 after the last sequence); out: counts of bands above 1
    sums,
    ones,
    cu_seqlens,
    chunk_first,
    segment_sequence,  # read where TABLED
    segment_first,
    inverse_scale,
    T,
    NT,
    SEGMENTS,  # segments per sequence, where not TABLED
    LENGTH,  # chunks per segment
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    C: gl.constexpr,
    BOUNDED: gl.constexpr,
    HAS_INITIAL: gl.constexpr,
    ROWS: gl.constexpr,
    FINAL: gl.constexpr,
    PACKED: gl.constexpr,
    TABLED: gl.constexpr,
    FULL: gl.constexpr,  # every chunk has C tokens
    REGS: gl.constexpr,  # registers of a thread that makes operands
):
    """Run the forward of one (segment, head) with 8 warps for products and 8 for gates."""
    i_h = gl.program_id(0) % H
    i_s = gl.program_id(0) // H
    i_b, t, end, i_first, n_chunks = segment_of(
        i_s, cu_seqlens, chunk_first, segment_sequence, segment_first, T, NT, SEGMENTS, LENGTH, C, PACKED, TABLED
    )
    DT: gl.constexpr = gl.bfloat16
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    f_s = gl.allocate_shared_memory(DT, [2, C, K], swizzled)
    v_s = gl.allocate_shared_memory(DT, [2, C, V], swizzled)
    qd_s = gl.allocate_shared_memory(DT, [2, K, C], swizzled)
    kd_s = gl.allocate_shared_memory(DT, [2, K, C], swizzled)
    h_s = gl.allocate_shared_memory(DT, [K, V], swizzled)
    p_s = gl.allocate_shared_memory(DT, [C, C], swizzled)
    half_s = gl.allocate_shared_memory(gl.float32, [4, K], plain)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, rows))
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, rows))
    o_ij = o_i[:, None] * C + o_j[None, :]
    eye_s = gl.allocate_shared_memory(DT, [C, C], swizzled, gl.load(ones + o_ij))
    sums_s = gl.allocate_shared_memory(gl.float16, [C, C], swizzled, gl.load(sums + o_ij))
    fence_async_shared()
    fq_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    op_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    op_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for n in gl.static_range(2):
        mbarrier.init(fq_full.index(n), count=1)
        mbarrier.init(v_full.index(n), count=1)
        mbarrier.init(op_full.index(n), count=1)
        mbarrier.init(op_empty.index(n), count=1)
    barrier()
    for n in gl.static_range(2):
        fetch(f, i_b, t + n * C, end, i_h, f_s.index(n), fq_full.index(n), 4 * C * K, PACKED, n < n_chunks)
        fetch(q, i_b, t + n * C, end, i_h, q_s.index(n), fq_full.index(n), 0, PACKED, n < n_chunks)
    fetch(v, i_b, t, end, i_h, v_s.index(0), v_full.index(0), 2 * C * V, PACKED, n_chunks > 0)
    # fmt: off
    gl.warp_specialize(
        [
            (walk, (
                v, states, o, initial, initial_rows, final, v_s, h_s, p_s, qd_s, kd_s, half_s, v_full, op_full,
                op_empty, i_s, i_h, i_b, t, end, i_first, n_chunks, H, K, V, C, HAS_INITIAL, ROWS, FINAL, PACKED,
            )),
            (make_operands, (
                q, f, bound, bands, q_s, f_s, qd_s, kd_s, half_s, eye_s, sums_s, fq_full, op_full, op_empty,
                inverse_scale, i_h, i_b, t, end, i_first, n_chunks, H, K, C, BOUNDED, PACKED, FULL,
            )),
        ],
        [8],
        [REGS],
    )
    # fmt: on
