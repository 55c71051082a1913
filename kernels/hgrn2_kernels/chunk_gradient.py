"""The gradients of q, f and the lower bound within a chunk.

One program computes one (chunk, head, block of channels), in one of the three forms of chunk_forms.py.
"""

import triton
import triton.language as tl

from hgrn2_kernels.chunk_forms import banded_sums, exact_sums, fast_sums
from hgrn2_kernels.triton_math import (
    BANDED,
    EXACT,
    FAST,
    LOG2E,
    behind,
    channels,
    dot,
    exp2,
    form_of,
    gate,
    load_matrix,
    load_tokens,
    padded,
    prefetch_rows,
    reciprocal,
    sigmoid_parts,
    silu,
    span,
    store_tokens,
    sum_tokens,
)


@triton.jit
def gradient_of(
    item,
    n_bands,
    q,
    f,
    v,
    do,
    bound,
    states,
    dstates,
    dq,
    df,
    dbound,
    sums,
    ones,
    cu_seqlens,
    chunk_sequence,
    chunk_first,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dfb,
    stride_dft,
    stride_dfh,
    inverse_scale,
    T,
    NT,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
    DT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
    FORM: tl.constexpr,
):
    """Compute the gradients of item, a (chunk, head, block of channels), in the form FORM.

    The arguments are those of chunk_gradient_kernel, and n_bands is the count of bands of the item.
    """
    NK: tl.constexpr = (K + BK - 1) // BK
    i_k, i_h, i_c = item % NK, (item // NK % H).to(tl.int64), item // (NK * H)
    i_ch = (item // NK).to(tl.int64)
    o_v = tl.arange(0, BV)
    o_i = tl.arange(0, C)[:, None]
    o_j = tl.arange(0, C)[None, :]
    zero = tl.zeros([BK, C], tl.float32)
    square = tl.zeros([C, C], tl.float32)
    o_k = i_k * BK + tl.arange(0, BK)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_bound = tl.zeros([BK], tl.float32)
    if BOUNDED:
        b_bound = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)
    i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
    t = start.to(tl.int64)
    n_tokens = end - start
    p_f = f + i_b * stride_fb + t * stride_ft + i_h * stride_fh
    p_q = q + i_b * stride_qb + t * stride_qt + i_h * stride_qh
    p_v = v + i_b * stride_vb + t * stride_vt + i_h * stride_vh
    p_do = do + i_b * stride_dob + t * stride_dot + i_h * stride_doh
    b_f = load_tokens(p_f, stride_ft, o_k, n_tokens, K, BK, C, FULL)
    b_q = load_tokens(p_q, stride_qt, o_k, n_tokens, K, BK, C, FULL)
    b_v = load_tokens(p_v, stride_vt, o_v, n_tokens, V, BV, C, FULL).to(DT)
    b_do = load_tokens(p_do, stride_dot, o_v, n_tokens, V, BV, C, FULL).to(DT)
    b_h = tl.load(states + i_ch * K * V + o_kv, mask=m_kv, other=0.0)
    b_dh = tl.load(dstates + i_ch * K * V + o_kv, mask=m_kv, other=0.0)

    if FORM == FAST and AHEAD > 0 and FULL and K % BK == 0 and V == BV:
        next_item = item + AHEAD
        if next_item < tl.num_programs(0):
            next_k, next_c = next_item % NK, next_item // (NK * H)
            next_h = (next_item // NK % H).to(tl.int64)
            next_b, next_t, _ = span(next_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
            p_next = f + next_b * stride_fb + next_t.to(tl.int64) * stride_ft + next_h * stride_fh
            prefetch_rows(p_next + next_k * BK, stride_ft, BK, C)
            p_next = q + next_b * stride_qb + next_t.to(tl.int64) * stride_qt + next_h * stride_qh
            prefetch_rows(p_next + next_k * BK, stride_qt, BK, C)
            next_state = (next_item // NK).to(tl.int64) * K * V + next_k * BK * V
            prefetch_rows(states + next_state, V, V, BK)
            prefetch_rows(dstates + next_state, V, V, BK)
            # the other blocks of channels of that chunk read the same v and do
            if next_k == 0:
                p_next = v + next_b * stride_vb + next_t.to(tl.int64) * stride_vt + next_h * stride_vh
                prefetch_rows(p_next, stride_vt, V, C)
                p_next = do + next_b * stride_dob + next_t.to(tl.int64) * stride_dot + next_h * stride_doh
                prefetch_rows(p_next, stride_dot, V, C)
    # the gradient of the chunk's total decay, through the state that passes the chunk
    if DT == tl.float32:
        # a reduction would pass its result through shared memory, and write it there more than once
        passing = dot(b_h * b_dh, tl.full([BV, C], 1.0, tl.float32), zero)
    if FORM == EXACT and DT != tl.float32:
        passing = tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)[:, None]
    # [i, j] is the gradient of the score of query i and key j
    dscores = tl.where(o_i >= o_j, dot(b_do, tl.trans(b_v), square), 0.0).to(DT)
    if FORM == EXACT:
        # the scores of a token with itself contain no gate
        diagonal = tl.sum(tl.where(o_i == o_j, dscores.to(tl.float32), 0.0), 0)[None, :]
        dscores = tl.where(o_i > o_j, dscores.to(tl.float32), 0.0).to(DT)
    eye = load_matrix(ones, 0, C).to(q.dtype.element_ty)
    x = padded(channels(b_f, eye), n_tokens, C, FULL)
    g, k = gate(x, b_bound[:, None], DT)
    x_q = channels(b_q, eye)
    a = silu(x_q, inverse_scale)
    if FORM == FAST:
        dq_sum, k_dk, balance, written, all_written = fast_sums(g, a, k, b_h, b_dh, b_v, b_do, dscores, sums, DT)
    if FORM == BANDED:
        dq_sum, k_dk, balance, k, e_floor, whole, framed = banded_sums(
            g, a, k, b_h, b_do, dscores, n_bands, sums, LEVELS, DT
        )
    if FORM == EXACT:
        dq_sum, k_dk, balance, written, whole, framed = exact_sums(
            g, a, k, b_h, b_dh, b_v, b_do, dscores, diagonal, o_i, o_j, sums, ones, LEVELS, DT
        )

    # These are the same products with another copy of the identity. With the first copy the compiler would keep
    # their results in registers, which costs more.
    again = load_matrix(ones, 1, C).to(q.dtype.element_ty)
    x_q = channels(b_q, again)
    s = reciprocal(inverse_scale + inverse_scale * exp2(-x_q * LOG2E))
    b_dq = dq_sum * s * (1.0 + x_q * (1.0 - s * inverse_scale))
    p_dq = dq + i_b * stride_dqb + t * stride_dqt + i_h * stride_dqh
    store_tokens(p_dq, stride_dqt, o_k, n_tokens, tl.trans(b_dq.to(dq.dtype.element_ty)), K, BK, C, FULL)

    if FORM == BANDED:
        written = k * exp2(whole - 2 * framed - e_floor) * dot(b_dh.to(DT), tl.trans(b_v), zero)
        k_dk += written

    # Gate t decays the queries from t on, the keys written before t, and the state that passes the chunk.
    if FORM != EXACT and DT != tl.float32:
        # This product reads the states from shared memory. Computed earlier, its result would occupy registers
        # for a long time.
        corner = dot(b_h.to(DT), tl.trans(b_dh.to(DT)), tl.zeros([BK, BK], tl.float32))
        corner = tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], corner, 0.0)
        passing = tl.sum(corner, 1)[:, None]
    if FORM == FAST and DT != tl.float32:
        # This sums up all writes. The balance, summed from a gate on, subtracts the writes after that gate.
        passing += all_written
    if FORM != FAST:
        passing *= exp2(whole - 2 * framed)
    dg = sum_tokens(balance, load_matrix(ones, 2, C)) + passing
    if FORM != FAST or DT == tl.float32:
        # After a closed gate, a sum is far smaller than its largest term. So no term may be added and then
        # subtracted again.
        dg += sum_tokens(written, load_matrix(ones, 3, C))
    x = padded(channels(b_f, again), n_tokens, C, FULL)
    e, r = sigmoid_parts(x)
    k = (1.0 - b_bound[:, None]) * r
    share = reciprocal(b_bound[:, None] + e)
    # dg / forget - dk, each times the derivative of the gate. Without a bound, e * share is 1.
    b_df = k * (dg * (e * share)) - k_dk * (e * r)
    p_df = df + i_b * stride_dfb + t * stride_dft + i_h * stride_dfh
    store_tokens(p_df, stride_dft, o_k, n_tokens, tl.trans(b_df.to(df.dtype.element_ty)), K, BK, C, FULL)
    if BOUNDED:
        # a bound of exactly 0 is a constant of the model, and dg / forget would be noise there
        db = dg * share - k_dk * reciprocal(1.0 - b_bound)[:, None]
        if not FULL:
            db = tl.where((tl.arange(0, C) < n_tokens)[None, :], db, 0.0)
        p_db = dbound + (i_h * K + o_k) * NC + i_c
        tl.store(p_db, tl.where(b_bound > 0, tl.sum(db, 1), 0.0), mask=o_k < K)


@triton.jit
def no_gradient(
    item,
    dq,
    df,
    cu_seqlens,
    chunk_sequence,
    chunk_first,
    stride_dqt,
    stride_dqh,
    stride_dft,
    stride_dfh,
    T,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write zeros for an item that lies after the last packed sequence."""
    NK: tl.constexpr = (K + BK - 1) // BK
    o_k = item % NK * BK + tl.arange(0, BK)
    start = behind(item // (NK * H), cu_seqlens, chunk_sequence, chunk_first, C)
    t, i_h = start.to(tl.int64), (item // NK % H).to(tl.int64)
    none = tl.zeros([C, BK], dq.dtype.element_ty)
    store_tokens(dq + t * stride_dqt + i_h * stride_dqh, stride_dqt, o_k, T - start, none, K, BK, C, FULL)
    store_tokens(df + t * stride_dft + i_h * stride_dfh, stride_dft, o_k, T - start, none, K, BK, C, FULL)


@triton.jit
def bands_of_item(bands, item, K: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr):
    """Return the count of bands of a (chunk, head, block of BK channels)."""
    NK: tl.constexpr = (K + BK - 1) // BK
    NF: tl.constexpr = (K + BF - 1) // BF
    return tl.load(bands + item // NK * NF + item % NK // (BF // BK)).to(tl.int32)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def chunk_gradient_kernel(
    q,  # [B, T, H, K] raw queries
    f,  # [B, T, H, K] raw gates
    v,  # [B, T, H, V]
    do,  # [B, T, H, V], gradient of o
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], the state entering each chunk
    dstates,  # [chunks, H, K, V], gradient of the state leaving each chunk
    bands,  # [chunks, H, K / BF] int8, written by chunk_state_kernel
    dq,  # [B, T, H, K], out
    df,  # [B, T, H, K], out
    dbound,  # [H, K, NC] fp32, out where BOUNDED: the contribution of each chunk
    sums,
    ones,
    cu_seqlens,  # [N + 1] int32, read where PACKED
    chunk_sequence,  # [chunks] int32, the sequence of each chunk; read where PACKED
    chunk_first,  # [N + 1] int32, the first chunk of each sequence; read where PACKED
    stride_qb,
    stride_qt,
    stride_qh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dfb,
    stride_dft,
    stride_dfh,
    inverse_scale,
    T,
    NT,
    NC,  # number of contributions to the gradient of the bound
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,  # channels that share a form, a multiple of BK
    BV: tl.constexpr,
    AHEAD: tl.constexpr,  # a program prefetches the tiles of program pid + AHEAD; 0 turns prefetching off
    DT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
):
    item = tl.program_id(0)
    n_bands = bands_of_item(bands, item, K, BK, BF)
    form = form_of(n_bands)
    # this loop becomes three pieces of code, as in chunk_output.py
    for FORM in tl.static_range(3):
        if form == FORM:
            # fmt: off
            gradient_of(
                item, n_bands, q, f, v, do, bound, states, dstates, dq, df, dbound, sums, ones, cu_seqlens,
                chunk_sequence, chunk_first, stride_qb, stride_qt, stride_qh, stride_fb, stride_ft, stride_fh,
                stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh, stride_dqb, stride_dqt,
                stride_dqh, stride_dfb, stride_dft, stride_dfh, inverse_scale, T, NT, NC, H, K, V, C, LEVELS, BK,
                BV, AHEAD, DT, BOUNDED, PACKED, FULL, FORM,
            )
            # fmt: on
            return
    if PACKED:
        if n_bands == 0:
            # fmt: off
            no_gradient(
                item, dq, df, cu_seqlens, chunk_sequence, chunk_first, stride_dqt, stride_dqh, stride_dft, stride_dfh,
                T, H, K, C, BK, FULL,
            )
            # fmt: on
