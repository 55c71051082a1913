"""Outputs of a chunk from the state at its border: o forward, dv in the backward. One program a (chunk, head).

A chunk within the limit takes one product, in the frame of its middle. Beyond it, tokens are dealt out to bands of
decay, in each channel by itself, from the border of the state on: of the two operands of a score the one nearer to that
border says in which band's frame they meet, and the other may fade there, but not grow beyond the limit. Where that
would be too many bands, the chunk is taken exactly, level by level: in each block of 2^shift tokens, queries of the
second half meet keys of the first through the token between them, so that every exponent is at most 0. chunk_state says
which.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    BANDED,
    EXACT,
    FAST,
    behind,
    channels,
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
    silu,
    span,
    store_tokens,
    sum_all_gates,
    sum_gates,
)


@triton.jit(do_not_specialize=["T", "NT"])
def chunk_output_kernel(
    q,  # [B, T, H, K] raw
    f,  # [B, T, H, K] raw gate
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], of chunk_state_kernel
    bands,  # [chunks, H, K / BK] int8
    o,  # [B, T, H, V], out: o, or dv where REVERSE
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
    stride_yb,
    stride_yt,
    stride_yh,
    stride_ob,
    stride_ot,
    stride_oh,
    inverse_scale,
    T,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    item = tl.program_id(0)
    most = tl.load(bands + item * NK)
    for n in tl.static_range(1, NK):
        most = tl.maximum(most, tl.load(bands + item * NK + n))
    form = form_of(most)
    # three pieces of code, of which a chunk runs one. Each makes all that it needs for itself: what is made before them
    # is kept for all, and the fast form has no registers for that
    for FORM in tl.static_range(3):
        if form == FORM:
            o_v = tl.arange(0, BV)
            eye = load_matrix(ones, 0, C).to(q.dtype.element_ty)
            i = tl.arange(0, C)[:, None]
            j = tl.arange(0, C)[None, :]
            i_c, i_h = item // H, (item % H).to(tl.int64)
            place = item.to(tl.int64)
            i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
            t = start.to(tl.int64)
            left = end - start
            p_q = q + i_b * stride_qb + t * stride_qt + i_h * stride_qh
            p_f = f + i_b * stride_fb + t * stride_ft + i_h * stride_fh
            p_y = y + i_b * stride_yb + t * stride_yt + i_h * stride_yh
            if FULL and V == BV:
                # needed last, and there are no registers to load it early
                prefetch_rows(p_y, stride_yt, V, C)
                if FORM != FAST and K % BK == 0:
                    # no pipeline fetches these
                    prefetch_rows(p_f, stride_ft, K, C)
                    prefetch_rows(p_q, stride_qt, K, C)
                    prefetch_rows(states + place * K * V, V, V, K)
            scores = tl.zeros([C, C], tl.float32)
            out = tl.zeros([C, BV], tl.float32)
            causal = (i <= j) if REVERSE else (i >= j)
            for i_k in tl.range(0, NK, num_stages=STAGES if FORM == FAST else 1):
                o_k = i_k * BK + tl.arange(0, BK)
                b = tl.zeros([BK], tl.float32)
                if BOUNDED:
                    b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)
                b_f = load_tokens(p_f, stride_ft, o_k, left, K, BK, C, FULL)
                b_q = load_tokens(p_q, stride_qt, o_k, left, K, BK, C, FULL)
                m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
                b_h = tl.load(states + place * K * V + o_k[:, None] * V + o_v[None, :], mask=m_kv, other=0.0)
                g, k = gate(padded(channels(b_f, eye), left, C, FULL), b[:, None], DT)
                zero = tl.zeros([C, C], tl.float32)
                if FORM == FAST:
                    a = silu(channels(b_q, eye), inverse_scale)
                    decay = sum_gates(g, load_matrix(sums, 0, C), False)
                    qd = (a * exp2(decay)).to(DT)
                    kd = (k * exp2(-decay)).to(DT)
                    read = kd if REVERSE else qd
                    product = dot(tl.trans(kd), qd, zero) if REVERSE else dot(tl.trans(qd), kd, zero)
                    # entries on the other side of the diagonal may be infinite: chosen away, never multiplied by 0
                    scores += tl.where(causal, product, 0.0)
                else:
                    # to the border that the state is at, less what it has been decayed by towards the middle
                    border = sum_gates(g, load_matrix(sums, LEVELS + 2 if REVERSE else LEVELS + 1, C), FORM == BANDED)
                    e = border - frame(sum_all_gates(g, ones, C), DT)
                    a = silu(channels(b_q, eye), inverse_scale)
                    # of a score, the operand that also reads the state, and the one that writes it in chunk_state
                    reader, writer = (k, a) if REVERSE else (a, k)
                    read = (reader * exp2(e)).to(DT)
                out = dot(tl.trans(read), b_h.to(DT), out)
                if FORM == BANDED:
                    # masked at last: what a reader before a band would have of it is not causal, and may be infinite
                    written = tl.where(in_band(e, DT), writer * exp2(-e), 0.0).to(DT)
                    scores = dot(tl.trans(read), written, scores)
                    for _ in tl.range(1, tl.load(bands + place * NK + i_k).to(tl.int32), num_stages=1):
                        e += 2 * limit(DT)
                        read = (reader * exp2(tl.minimum(e, limit(DT)))).to(DT)
                        written = tl.where(in_band(e, DT), writer * exp2(-e), 0.0).to(DT)
                        scores = dot(tl.trans(read), written, scores)
                if FORM == EXACT:
                    apart = tl.where(causal, i ^ j, 0)
                    shift = LEVELS
                    for _ in tl.range(0, LEVELS, num_stages=1):
                        decay = sum_gates(g, load_matrix(sums, shift, C), False)
                        shift -= 1
                        second = ((j >> shift) & 1) != 0
                        operand = (tl.where(second, a, k) * exp2(decay)).to(DT)
                        # the highest bit in which two tokens differ says at which level they meet
                        product = dot(tl.trans(operand), operand, zero)
                        scores += tl.where((apart >> shift) == 1, product, 0.0)
                    scores += tl.where(i == j, dot(tl.trans(a.to(DT)), k.to(DT), zero), 0.0)
            if FORM == BANDED:
                scores = tl.where(causal, scores, 0.0)
            b_y = load_tokens(p_y, stride_yt, o_v, left, V, BV, C, FULL).to(DT)
            rounded = scores.to(DT)
            if K < 64 and DT != tl.float32:
                # so few channels that the rounding of the scores shows
                out = dot((scores - rounded.to(tl.float32)).to(DT), b_y, out)
            out = dot(rounded, b_y, out)
            p_o = o + i_b * stride_ob + t * stride_ot + i_h * stride_oh
            store_tokens(p_o, stride_ot, o_v, left, out.to(o.dtype.element_ty), V, BV, C, FULL)
            return
    if PACKED:
        # behind the last sequence
        o_v = tl.arange(0, BV)
        start = behind(item // H, cu_seqlens, chunk_sequence, chunk_first, C)
        p_o = o + start.to(tl.int64) * stride_ot + (item % H).to(tl.int64) * stride_oh
        store_tokens(p_o, stride_ot, o_v, T - start, tl.zeros([C, BV], o.dtype.element_ty), V, BV, C, FULL)
