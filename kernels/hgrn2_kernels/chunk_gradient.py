"""Gradients of q, f and the lower bound within a chunk. One program a (chunk, head, block of channels).

With P the product of each operand with its raw accumulator, gradients of queries counted plus and of keys minus, the
gradient of log gate t is the sum of P from t on: pairs with both ends there cancel, term by term, because the same
rounded operands stand in both. Compiled twice, fast and exact, as chunk_output.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    LOG2E,
    OPEN,
    block_decay_matrix,
    dot,
    gate,
    load_rows,
    reciprocal,
    sigmoid_parts,
    silu,
    span,
    store_rows,
    sum_rows,
)


@triton.jit(do_not_specialize=["T", "NT"])
def chunk_gradient_kernel(
    q,  # [B, T, H, K] raw
    f,  # [B, T, H, K] raw gate
    v,  # [B, T, H, V]
    do,  # [B, T, H, V]
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], entering each chunk
    dstates,  # [chunks, H, K, V], gradient of the state leaving each chunk
    slow,  # [chunks, H, K / BF] int8
    dq,  # [B, T, H, K], out
    df,  # [B, T, H, K], out
    dbound,  # [chunks, H, K] fp32, out where BOUNDED
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
    stride_ob,
    stride_ot,
    stride_oh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dfb,
    stride_dft,
    stride_dfh,
    scale,
    T,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,  # channels that share a flag and a frame, a multiple of BK
    BV: tl.constexpr,
    DT: tl.constexpr,
    EXACT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_c = pid // (NK * H)
    i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
    place = i_c.to(tl.int64) * H + i_h
    if start >= end:
        return
    NF: tl.constexpr = (K + BF - 1) // BF
    is_slow = tl.load(slow + place * NF + i_k * BK // BF) != 0
    if is_slow != EXACT:
        return

    o_c = tl.arange(0, C)
    i = o_c[:, None]
    j = o_c[None, :]
    o_t = start + o_c
    m_t = o_t < end
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    b = tl.zeros([1, BK], tl.float32)
    if BOUNDED:
        b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)[None, :]
    b_x = load_rows(f + i_b * stride_fb + i_h * stride_fh, stride_ft, o_t, o_k, m_t, K, OPEN).to(tl.float32)
    b_qx = load_rows(q + i_b * stride_qb + i_h * stride_qh, stride_qt, o_t, o_k, m_t, K, 0.0).to(tl.float32)
    b_v = load_rows(v + i_b * stride_vb + i_h * stride_vh, stride_vt, o_t, o_v, m_t, V, 0.0).to(DT)
    b_do = load_rows(do + i_b * stride_ob + i_h * stride_oh, stride_ot, o_t, o_v, m_t, V, 0.0).to(DT)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = place * K * V + o_k[:, None] * V + o_v[None, :]
    b_h = tl.load(states + o_kv, mask=m_kv, other=0.0).to(DT)
    b_dh = tl.load(dstates + o_kv, mask=m_kv, other=0.0).to(DT)

    g, k = gate(b_x, b)
    b_q = silu(b_qx, scale)
    zero = tl.zeros([C, BK], tl.float32)
    square = tl.zeros([C, C], tl.float32)
    dscores = tl.where(i >= j, dot(b_do, tl.trans(b_v), square), 0.0).to(DT)
    dscores_t = tl.where(i <= j, dot(b_v, tl.trans(b_do), square), 0.0).to(DT)
    # gradient of the chunk's total decay, through the state that passes it
    passing = tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)[None, :]

    decay = sum_rows(block_decay_matrix(i, j, LEVELS), g, DT)
    if EXACT:
        dq_sum, dk_sum, balance = zero, zero, zero
        shift = LEVELS
        for _ in tl.range(0, LEVELS, num_stages=1):
            half = (1 << shift) >> 1
            second_i = (i & ((1 << shift) - 1)) >= half
            second_j = (j & ((1 << shift) - 1)) >= half
            factor = tl.exp2(-tl.abs(decay))
            operand = (tl.where(second_i, b_q, k) * factor).to(DT)
            pair = ((i >> shift) == (j >> shift)) & (second_i != second_j)
            dpair = tl.where(pair, tl.where(second_i, dscores, dscores_t), 0.0).to(DT)
            raw = dot(dpair, operand, zero)
            signed = operand.to(tl.float32) * raw
            balance += tl.where(second_i, signed, -signed)
            raw *= factor
            dq_sum += tl.where(second_i, raw, 0.0)
            dk_sum += tl.where(second_i, 0.0, raw)
            shift -= 1
            decay = sum_rows(block_decay_matrix(i, j, shift), g, DT)
        # a token with itself: no gate in between
        diagonal = tl.sum(tl.where(i == j, dscores.to(tl.float32), 0.0), 1)[:, None]
        dq_sum += diagonal * k
        dk_sum += diagonal * b_q
        factor = tl.exp2(sum_rows(tl.where(j <= i, 1.0, 0.0), g, DT))
        raw = factor * dot(b_do, tl.trans(b_h), zero)
        balance += b_q * raw
        dq_sum += raw
        factor = tl.exp2(sum_rows(tl.where(j > i, 1.0, 0.0), g, DT))
        raw = factor * dot(b_v, tl.trans(b_dh), zero)
        written = k * raw
        dk_sum += raw
        passing *= tl.exp2(tl.sum(g, 0))[None, :]
    else:
        factor = tl.exp2(decay)
        qd = (b_q * factor).to(DT)
        inverse = tl.exp2(-decay)
        kd = (k * inverse).to(DT)
        raw = dot(b_do, tl.trans(b_h), dot(dscores, kd, zero))
        balance = qd.to(tl.float32) * raw
        dq_sum = raw * factor
        raw = dot(dscores_t, qd, zero)
        balance -= kd.to(tl.float32) * raw
        raw_state = dot(b_v, tl.trans(b_dh), zero)
        written = kd.to(tl.float32) * raw_state
        dk_sum = (raw + raw_state) * inverse

    # queries from t on carry gate t, and so do keys written before t and the state that passes
    if EXACT:
        # a closed gate leaves of each sum what is far below its largest term: no term may enter and be taken out
        dg = sum_rows(tl.where(j >= i, 1.0, 0.0), balance, DT) + sum_rows(tl.where(j < i, 1.0, 0.0), written, DT)
    else:
        dg = sum_rows(tl.where(j >= i, 1.0, 0.0), balance - written, DT) + tl.sum(written, 0)[None, :]
    dg += passing

    s = reciprocal(1.0 + tl.exp2(-b_qx * LOG2E))
    b_dq = dq_sum * scale * s * (1.0 + b_qx * (1.0 - s))
    p_dq = dq + i_b * stride_dqb + i_h * stride_dqh
    store_rows(p_dq, stride_dqt, o_t, o_k, m_t, K, b_dq.to(dq.dtype.element_ty))
    n, m, r = sigmoid_parts(b_x)
    # dg / forget - dk, times 1 + exp(-|x|) taken out of both; n underflows for closed gates without a bound
    t = dg * reciprocal(tl.maximum(n + b * m, 1.0e-30)) - dk_sum * r
    b_df = n * (m * r - b * (m * r)) * t
    p_df = df + i_b * stride_dfb + i_h * stride_dfh
    store_rows(p_df, stride_dft, o_t, o_k, m_t, K, b_df.to(df.dtype.element_ty))
    if BOUNDED:
        # a bound of exactly 0 is a constant of the model, and dg / forget there is noise
        db = tl.sum(tl.where(m_t[:, None] & (b > 0), m * t, 0.0), 0)
        tl.store(dbound + place * K + o_k, db, mask=o_k < K)
