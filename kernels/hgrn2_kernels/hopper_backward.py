"""The backward in one pass over the chunks in reverse, for Hopper: dv, dq, df and the gradient of the bound.

One program computes one (segment, head). It has two groups of warps with different roles, as in hopper_forward.py: one
makes the operands of a chunk, and the other holds the gradient of the state [K, V] in registers, computes the products,
and makes dq and df from them. The two roles are in hopper_backward_roles.py.

The gradient of the state is correct for all gates, like the state in hopper_forward.py. For a chunk beyond the fast
limit, the gradient of the state is stored, the gradient of the bound gets nothing on the channels that are beyond, and
the kernels of chunk_beyond.py compute dv, dq and df again. Where all channels of a chunk are beyond the limit, only the
gradient of the state is computed here.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from hgrn2_kernels.hopper_backward_roles import fetch_state, make_operands, walk
from hgrn2_kernels.hopper_math import barrier, fetch, segment_of


@gluon.jit(do_not_specialize=["T", "NT", "NC", "parts", "SEGMENTS", "LENGTH"])
def hopper_backward_kernel(
    q,  # [B, T, H, K] bf16 raw queries: a descriptor, see hopper.py, as are all tensors up to df
    f,  # raw gates
    v,
    do,
    states,  # [chunks H K, V] bf16: a descriptor: the state entering each chunk, see frame
    dstates,  # the same, out for chunks beyond the limit: gradient of the state leaving the chunk
    dv,  # out
    dq,  # out
    df,  # out
    bound,  # [H, K] fp32, read where BOUNDED
    initial,  # [segments, H, K, V] fp32: gradient of the state after the segment, read where HAS_INITIAL
    initial_rows,  # [segments] int32, the row of initial that a segment takes, -1 for zeros; read where ROWS
    final,  # [segments, H, K, V] fp32, out where FINAL: gradient of the state before the segment
    bands,  # [chunks, H, K / 64] int32, the counts of the forward
    dbound,  # [H, K, NC] fp32, out where BOUNDED: the part of segment i_s at index parts + i_s
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
    FULL: gl.constexpr,
    REGS: gl.constexpr,  # registers of a thread that makes operands
):
    """Run the backward of one (segment, head) with 8 warps for products and gradients, and 4 for gates."""
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
    v_s = gl.allocate_shared_memory(DT, [1, C, V], swizzled)
    do_s = gl.allocate_shared_memory(DT, [1, C, V], swizzled)
    h_s = gl.allocate_shared_memory(DT, [1, K, V], swizzled)
    qd_s = gl.allocate_shared_memory(DT, [1, K, C], swizzled)
    kd_s = gl.allocate_shared_memory(DT, [1, K, C], swizzled)
    units_s = gl.allocate_shared_memory(gl.float16, [1, K, C], swizzled)
    p_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    d_s = gl.allocate_shared_memory(DT, [1, C, C], swizzled)
    half_s = gl.allocate_shared_memory(gl.float32, [2, K], plain)
    # sums of each channel, which would occupy registers, see `walk`
    passing_s = gl.allocate_shared_memory(gl.float32, [1, K], plain)
    passed_s = gl.allocate_shared_memory(gl.float32, [1, K], plain)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    o_i = gl.arange(0, C, layout=gl.SliceLayout(1, rows))
    o_j = gl.arange(0, C, layout=gl.SliceLayout(0, rows))
    at = o_i[:, None] * C + o_j[None, :]
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
    barrier()
    m_last = t + (n_chunks - 1) * C
    for n in gl.static_range(2):
        fetch(f, i_b, m_last - n * C, end, i_h, f_s.index(n), fq_full.index(n), 4 * C * K, PACKED, n < n_chunks)
        fetch(q, i_b, m_last - n * C, end, i_h, q_s.index(n), fq_full.index(n), 0, PACKED, n < n_chunks)
        if n == 0:
            fetch_state(states, ((i_first + n_chunks - 1) * H + i_h) * K, h_s.index(0), h_full, 2 * K * V, n_chunks > 0)
            fetch(do, i_b, m_last, end, i_h, do_s.index(0), do_full, 2 * C * V, PACKED, n_chunks > 0)
            fetch(v, i_b, m_last, end, i_h, v_s.index(0), v_full, 2 * C * V, PACKED, n_chunks > 0)
    # fmt: off
    gl.warp_specialize(
        [
            (walk, (
                q, f, v, do, states, dstates, dv, dq, df, bound, initial, initial_rows, final, bands, dbound,
                q_s, f_s, v_s, do_s, h_s, qd_s, kd_s, units_s, p_s, d_s, half_s, passing_s, passed_s,
                eye_s, sums_s, from_s, fq_full, v_full, do_full, h_full, op_full, op_empty,
                inverse_scale, i_s, i_h, i_b, t, end, i_first, n_chunks, NC, parts,
                H, K, V, C, BOUNDED, HAS_INITIAL, ROWS, FINAL, PACKED, FULL,
            )),
            (make_operands, (
                bound, q_s, f_s, qd_s, kd_s, units_s, half_s, eye_s, sums_s, fq_full, op_full, op_empty,
                inverse_scale, i_h, t, end, n_chunks, K, C, BOUNDED, FULL,
            )),
        ],
        [4],
        [REGS],
    )
    # fmt: on
