"""Gradients of q, f and the lower bound within a chunk. One program a (chunk, head, block of channels).

With P the product of each operand with its raw accumulator, gradients of queries counted plus and of keys minus, the
gradient of log gate t is the sum of P from t on: pairs with both ends there cancel, term by term, because the same
rounded operands stand in both. A chunk is taken in one of the three forms of chunk_output.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    BANDED,
    EXACT,
    FAST,
    LARGEST,
    LARGEST_FP32,
    LOG2E,
    behind,
    channels,
    column,
    dot,
    exp2,
    form_of,
    frame,
    gate,
    in_band,
    limit,
    load_matrix,
    load_tokens,
    padded,
    prefetch_rows,
    reciprocal,
    rounded,
    sigmoid_parts,
    silu,
    span,
    store_tokens,
    sum_all_gates,
    sum_gates,
    sum_tokens,
)


@triton.jit
def opaque(x):
    return tl.inline_asm_elementwise("mov.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def chunk_gradient_kernel(
    q,  # [B, T, H, K] raw
    f,  # [B, T, H, K] raw gate
    v,  # [B, T, H, V]
    do,  # [B, T, H, V]
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], entering each chunk
    dstates,  # [chunks, H, K, V], gradient of the state leaving each chunk
    bands,  # [chunks, H, K / BF] int8
    dq,  # [B, T, H, K], out
    df,  # [B, T, H, K], out
    dbound,  # [H, K, chunks] fp32, out where BOUNDED
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
    stride_ob,
    stride_ot,
    stride_oh,
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
    BF: tl.constexpr,  # channels that share a form, a multiple of BK
    BV: tl.constexpr,
    AHEAD: tl.constexpr,  # programs that run at a time, whose successors' tiles are fetched into L2, or 0
    DT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NF: tl.constexpr = (K + BF - 1) // BF
    item = tl.program_id(0)
    n_bands = tl.load(bands + item // NK * NF + item % NK // (BF // BK)).to(tl.int32)
    form = form_of(n_bands)
    # three pieces of code, as in chunk_output
    for FORM in tl.static_range(3):
        if form == FORM:
            i_k, i_h, i_c = item % NK, (item // NK % H).to(tl.int64), item // (NK * H)
            place = (item // NK).to(tl.int64)
            o_v = tl.arange(0, BV)
            i = tl.arange(0, C)[:, None]
            j = tl.arange(0, C)[None, :]
            zero = tl.zeros([BK, C], tl.float32)
            square = tl.zeros([C, C], tl.float32)
            o_k = i_k * BK + tl.arange(0, BK)
            m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
            o_kv = o_k[:, None] * V + o_v[None, :]
            b = tl.zeros([BK], tl.float32)
            if BOUNDED:
                b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)
            i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
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
                    # the other blocks of channels of that chunk share v and do
                    if next_k == 0:
                        p_next = v + next_b * stride_vb + next_t.to(tl.int64) * stride_vt + next_h * stride_vh
                        prefetch_rows(p_next, stride_vt, V, C)
                        p_next = do + next_b * stride_ob + next_t.to(tl.int64) * stride_ot + next_h * stride_oh
                        prefetch_rows(p_next, stride_ot, V, C)
            # gradient of the chunk's total decay, through the state that passes it
            if DT == tl.float32:
                # a reduction would hand its result on through shared memory, written more than once
                passing = dot(b_h * b_dh, tl.full([BV, C], 1.0, tl.float32), zero)
            if FORM == EXACT and DT != tl.float32:
                passing = tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)[:, None]
            # [i, j]: gradient of the score of query i and key j
            dscores = tl.where(i >= j, dot(b_do, tl.trans(b_v), square), 0.0).to(DT)
            if FORM == EXACT:
                # a token with itself: no gate in between
                diagonal = tl.sum(tl.where(i == j, dscores.to(tl.float32), 0.0), 0)[None, :]
                dscores = tl.where(i > j, dscores.to(tl.float32), 0.0).to(DT)
            eye = load_matrix(ones, 0, C).to(q.dtype.element_ty)
            x = padded(channels(b_f, eye), left, C, FULL)
            g, k = gate(x, b[:, None], DT)
            x_q = channels(b_q, eye)
            a = silu(x_q, inverse_scale)
            if FORM == FAST:
                decay = sum_gates(g, load_matrix(sums, 0, C), False)
                factor = exp2(decay)
                qd = rounded(a * factor, DT)
                kd = rounded(k * exp2(-decay), DT)
                raw = dot(b_dh.to(DT), tl.trans(b_v), zero)
                written = kd * raw
                if DT != tl.float32:
                    # all that is written, from which balance takes what is written after a gate
                    all_written = tl.sum(written, 1)[:, None]
                raw = dot(qd.to(DT), dscores, raw)
                k_dk = kd * raw
                raw = dot(kd.to(DT), tl.trans(dscores), dot(b_h.to(DT), tl.trans(b_do), zero))
                dq_sum = raw * factor
                balance = qd * raw - k_dk
                if DT == tl.float32:
                    balance += written
            if FORM == BANDED:
                earlier = sum_gates(g, load_matrix(sums, LEVELS + 1, C), False)
                whole = column(earlier, C - 1)[:, None]
                framed = frame(whole, DT)
                # to 2^-13, so that the steps from band to band are exact. Whole powers of two tell the bands apart: an
                # operand is rounded once for all of them, and one sum a side serves dq, df and the balance
                e = (earlier - framed + 1536.0) - 1536.0
                at = tl.floor(e)
                rest = exp2(e - at)
                a = rounded(a * rest, DT)
                k = rounded(k * reciprocal(rest), DT)
                q_sum = exp2(at) * dot(b_h.to(DT), tl.trans(b_do), zero)
                k_sum = zero
                for _ in tl.range(0, n_bands, num_stages=1):
                    at = tl.floor(e)
                    # this factor is taken twice, in two ways, lest the compiler keep it
                    qd = a * tl.minimum(exp2(at), LARGEST_FP32 if DT == tl.float32 else LARGEST)
                    inverse = tl.where(in_band(at, DT), exp2(-at), 0.0)
                    k_sum += dot(qd.to(DT), dscores, zero) * inverse
                    product = dot((k * inverse).to(DT), tl.trans(dscores), zero)
                    q_sum += product * exp2(tl.minimum(at, limit(DT)))
                    e += 2 * limit(DT)
                e -= n_bands * (2 * limit(DT))
                at = tl.floor(e)
                dq_sum = q_sum * exp2(e - at)
                k_dk = k * k_sum
                balance = a * q_sum - k_dk
            if FORM == EXACT:
                earlier = sum_gates(g, load_matrix(sums, LEVELS + 1, C), True)
                later = sum_gates(g, load_matrix(sums, LEVELS + 2, C), True)
                whole = column(earlier, C - 1)[:, None]
                # of the digits that chunk_state took
                framed = frame(sum_all_gates(g, ones, C), DT)
                # gradients of the scores of pairs, whichever of the two is the query
                dscores_t = tl.where(i < j, dot(b_v, tl.trans(b_do), square), 0.0)
                dpairs = tl.where(i > j, dscores.to(tl.float32), dscores_t).to(DT)
                dq_sum, dk_sum, balance = diagonal * k, diagonal * a, zero
                shift = LEVELS
                for _ in tl.range(0, LEVELS, num_stages=1):
                    factor = exp2(sum_gates(g, load_matrix(sums, shift, C), True))
                    shift -= 1
                    second = ((j >> shift) & 1) != 0
                    operand = rounded(tl.where(second, a, k) * factor, DT)
                    # the highest bit in which two tokens differ says at which level they meet
                    raw = dot(operand.to(DT), tl.where(((i ^ j) >> shift) == 1, dpairs, 0.0), zero)
                    signed = operand * raw
                    balance += tl.where(second, signed, -signed)
                    raw *= factor
                    dq_sum += tl.where(second, raw, 0.0)
                    dk_sum += tl.where(second, 0.0, raw)
                raw = exp2(earlier - framed) * dot(b_h.to(DT), tl.trans(b_do), zero)
                balance += a * raw
                dq_sum += raw
                raw = exp2(later - framed) * dot(b_dh.to(DT), tl.trans(b_v), zero)
                written = k * raw
                k_dk = k * (dk_sum + raw)

            # the same products by another identity, lest the compiler keep their results, which costs more
            again = load_matrix(ones, 1, C).to(q.dtype.element_ty)
            x_q = channels(b_q, again)
            s = reciprocal(inverse_scale + inverse_scale * exp2(-x_q * LOG2E))
            b_dq = dq_sum * s * (1.0 + x_q * (1.0 - s * inverse_scale))
            p_dq = dq + i_b * stride_dqb + t * stride_dqt + i_h * stride_dqh
            store_tokens(p_dq, stride_dqt, o_k, left, tl.trans(b_dq.to(dq.dtype.element_ty)), K, BK, C, FULL)

            if FORM == BANDED:
                written = k * exp2(whole - 2 * framed - at) * dot(b_dh.to(DT), tl.trans(b_v), zero)
                k_dk += written

            # queries from t on carry gate t, and so do keys written before t and the state that passes
            if FORM != EXACT and DT != tl.float32:
                # the states' product from shared memory; earlier, it would take registers for long
                corner = dot(b_h.to(DT), tl.trans(b_dh.to(DT)), tl.zeros([BK, BK], tl.float32))
                corner = tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], corner, 0.0)
                passing = tl.sum(corner, 1)[:, None]
            if FORM == FAST and DT != tl.float32:
                passing += all_written
            if FORM != FAST:
                passing *= exp2(whole - 2 * framed)
            dg = sum_tokens(balance, load_matrix(ones, 2, C)) + passing
            if FORM != FAST or DT == tl.float32:
                # a closed gate leaves of each sum what is far below its largest term: no term may enter and be
                # taken out
                dg += sum_tokens(written, load_matrix(ones, 3, C))
            x = padded(channels(b_f, again), left, C, FULL)
            e, r = sigmoid_parts(x)
            k = (1.0 - b[:, None]) * r
            share = reciprocal(b[:, None] + e)
            # dg / forget - dk by sigmoid(x): a gate without a bound closes to e, whose ratio to itself is 1
            b_df = k * (dg * (e * share)) - k_dk * (e * r)
            p_df = df + i_b * stride_dfb + t * stride_dft + i_h * stride_dfh
            store_tokens(p_df, stride_dft, o_k, left, tl.trans(b_df.to(df.dtype.element_ty)), K, BK, C, FULL)
            if BOUNDED:
                # a bound of exactly 0 is a constant of the model, and dg / forget there is noise
                db = dg * share - k_dk * reciprocal(1.0 - b)[:, None]
                if not FULL:
                    db = tl.where((tl.arange(0, C) < left)[None, :], db, 0.0)
                p_db = dbound + (i_h * K + o_k) * NC + i_c
                tl.store(p_db, tl.where(b > 0, tl.sum(db, 1), 0.0), mask=o_k < K)
            return
    if PACKED:
        # behind the last sequence
        o_k = item % NK * BK + tl.arange(0, BK)
        start = behind(item // (NK * H), cu_seqlens, chunk_sequence, chunk_first, C)
        t, i_h = start.to(tl.int64), (item // NK % H).to(tl.int64)
        none = tl.zeros([C, BK], dq.dtype.element_ty)
        store_tokens(dq + t * stride_dqt + i_h * stride_dqh, stride_dqt, o_k, T - start, none, K, BK, C, FULL)
        store_tokens(df + t * stride_dft + i_h * stride_dfh, stride_dft, o_k, T - start, none, K, BK, C, FULL)
