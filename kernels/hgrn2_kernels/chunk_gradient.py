"""Gradients of q, f and the lower bound within a chunk. One program a (chunk, head, block of channels).

With P the product of each operand with its raw accumulator, gradients of queries counted plus and of keys minus, the
gradient of log gate t is the sum of P from t on: pairs with both ends there cancel, term by term, because the same
rounded operands stand in both. Compiled twice, fast and exact, as chunk_output.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    LOG2E,
    block_decay_matrix,
    channels,
    column,
    dot,
    exp2,
    frame,
    gate,
    identity,
    load_tokens,
    opaque_identity,
    padded,
    reciprocal,
    sigmoid_parts,
    silu,
    span,
    store_tokens,
    sum_gates,
    sum_tokens,
)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
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
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,  # channels that share a flag, a multiple of BK
    BV: tl.constexpr,
    DT: tl.constexpr,
    EXACT: tl.constexpr,
    GROUP: tl.constexpr,  # chunks a program
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NF: tl.constexpr = (K + BF - 1) // BF
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    first = pid // (NK * H) * GROUP

    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    b = tl.zeros([BK], tl.float32)
    if BOUNDED:
        b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)
    for n in tl.range(0, GROUP, num_stages=1):
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        eye = identity(C, q.dtype.element_ty)
        zero = tl.zeros([BK, C], tl.float32)
        square = tl.zeros([C, C], tl.float32)
        i_c = tl.minimum(first + n, NC - 1)
        place = i_c.to(tl.int64) * H + i_h
        i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
        is_slow = tl.load(slow + place * NF + i_k * BK // BF) != 0
        if (first + n < NC) & (start < end) & (is_slow == EXACT):
            t = start.to(tl.int64)
            left = end - start
            p_f = f + i_b * stride_fb + t * stride_ft + i_h * stride_fh
            p_q = q + i_b * stride_qb + t * stride_qt + i_h * stride_qh
            p_v = v + i_b * stride_vb + t * stride_vt + i_h * stride_vh
            p_do = do + i_b * stride_ob + t * stride_ot + i_h * stride_oh
            b_f = load_tokens(p_f, stride_ft, o_k, left, K, BK, C, FULL)
            b_q = load_tokens(p_q, stride_qt, o_k, left, K, BK, C, FULL)
            b_v = load_tokens(p_v, stride_vt, o_v, left, V, BV, C, FULL).to(DT)
            b_do = load_tokens(p_do, stride_ot, o_v, left, V, BV, C, FULL).to(DT)
            b_h = tl.load(states + place * K * V + o_kv, mask=m_kv, other=0.0)
            b_dh = tl.load(dstates + place * K * V + o_kv, mask=m_kv, other=0.0)

            # [i, j]: gradient of the score of query i and key j
            dscores = tl.where(i >= j, dot(b_do, tl.trans(b_v), square), 0.0).to(DT)
            # gradient of the chunk's total decay, through the state that passes it
            if EXACT:
                passing = tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
            else:
                # off shared memory, where the products below need them as well
                corner = dot(b_h.to(DT), tl.trans(b_dh.to(DT)), tl.zeros([BK, BK], tl.float32))
                passing = tl.sum(tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], corner, 0.0), 1)

            x = padded(channels(b_f, eye), left, C, FULL)
            g, k = gate(x, b[:, None])
            x_q = channels(b_q, eye)
            a = silu(x_q, scale)
            decay = sum_gates(g, block_decay_matrix(i, j, LEVELS), DT, EXACT)
            if EXACT:
                dscores_t = tl.where(i <= j, dot(b_v, tl.trans(b_do), square), 0.0).to(DT)
                dq_sum, dk_sum, balance = zero, zero, zero
                shift = LEVELS
                for _ in tl.range(0, LEVELS, num_stages=1):
                    half = (1 << shift) >> 1
                    second_i = (i & ((1 << shift) - 1)) >= half
                    second_j = (j & ((1 << shift) - 1)) >= half
                    factor = exp2(-tl.abs(decay))
                    operand = (tl.where(second_j, a, k) * factor).to(DT)
                    pair = ((i >> shift) == (j >> shift)) & (second_i != second_j)
                    dpair = tl.where(pair, tl.where(second_i, dscores, dscores_t), 0.0).to(DT)
                    raw = dot(operand, dpair, zero)
                    signed = operand.to(tl.float32) * raw
                    balance += tl.where(second_j, signed, -signed)
                    raw *= factor
                    dq_sum += tl.where(second_j, raw, 0.0)
                    dk_sum += tl.where(second_j, 0.0, raw)
                    shift -= 1
                    decay = sum_gates(g, block_decay_matrix(i, j, shift), DT, EXACT)
                # a token with itself: no gate in between
                diagonal = tl.sum(tl.where(i == j, dscores.to(tl.float32), 0.0), 0)[None, :]
                dq_sum += diagonal * k
                dk_sum += diagonal * a
                earlier = sum_gates(g, tl.where(i <= j, 1.0, 0.0), DT, EXACT)
                later = sum_gates(g, tl.where(i > j, 1.0, 0.0), DT, EXACT)
                first_half, second_half = column(earlier, C // 2 - 1), column(later, C // 2 - 1)
                enters, leaves = frame(first_half), frame(second_half)
                raw = exp2(earlier - enters[:, None]) * dot(b_h.to(DT), tl.trans(b_do), zero)
                balance += a * raw
                dq_sum += raw
                raw = exp2(later - leaves[:, None]) * dot(b_dh.to(DT), tl.trans(b_v), zero)
                written = k * raw
                dk_sum += raw
                passing *= exp2((first_half - enters) + (second_half - leaves))
                # a closed gate leaves of each sum what is far below its largest term: no term may enter and be
                # taken out
                dg = sum_tokens(balance, tl.where(i >= j, 1.0, 0.0), DT)
                dg += sum_tokens(written, tl.where(i < j, 1.0, 0.0), DT) + passing[:, None]
            else:
                factor = exp2(decay)
                inverse = exp2(-decay)
                qd = (a * factor).to(DT)
                kd = (k * inverse).to(DT)
                raw = dot(kd, tl.trans(dscores), dot(b_h.to(DT), tl.trans(b_do), zero))
                balance = qd.to(tl.float32) * raw
                dq_sum = raw * factor
                raw_state = dot(b_dh.to(DT), tl.trans(b_v), zero)
                written = kd.to(tl.float32) * raw_state
                raw = dot(qd, dscores, zero)
                balance -= kd.to(tl.float32) * raw
                dk_sum = (raw + raw_state) * inverse
                # queries from t on carry gate t, and so do keys written before t and the state that passes
                dg = sum_tokens(balance - written, tl.where(i >= j, 1.0, 0.0), DT)
                dg += (tl.sum(written, 1) + passing)[:, None]

            # the same products again, which the compiler cannot know: to keep their results would cost more
            again = opaque_identity(C, q.dtype.element_ty, T)
            x = padded(channels(b_f, again), left, C, FULL)
            x_q = channels(b_q, again)
            _, k = gate(x, b[:, None])
            s = reciprocal(1.0 + exp2(-x_q * LOG2E))
            b_dq = dq_sum * scale * s * (1.0 + x_q * (1.0 - s))
            p_dq = dq + i_b * stride_dqb + t * stride_dqt + i_h * stride_dqh
            store_tokens(p_dq, stride_dqt, o_k, left, tl.trans(b_dq.to(dq.dtype.element_ty)), K, BK, C, FULL)
            e, r = sigmoid_parts(x)
            share = reciprocal(b[:, None] + e)
            # dg / forget - dk by sigmoid(x): a gate without a bound closes to e, whose ratio to itself is 1
            b_df = k * (dg * (e * share) - dk_sum * (e * r))
            p_df = df + i_b * stride_dfb + t * stride_dft + i_h * stride_dfh
            store_tokens(p_df, stride_dft, o_k, left, tl.trans(b_df.to(df.dtype.element_ty)), K, BK, C, FULL)
            if BOUNDED:
                # a bound of exactly 0 is a constant of the model, and dg / forget there is noise
                db = dg * share - dk_sum * r
                if not FULL:
                    db = tl.where((tl.arange(0, C) < left)[None, :], db, 0.0)
                tl.store(dbound + place * K + o_k, tl.where(b > 0, tl.sum(db, 1), 0.0), mask=o_k < K)
