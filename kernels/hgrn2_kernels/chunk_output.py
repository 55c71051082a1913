"""Outputs of a chunk from the state at its border: o forward, dv in the backward. One program a (chunk, head).

Compiled twice. The fast form takes one product a chunk, in the frame of the chunk's middle, and leaves a chunk that
exceeds its limit alone. The exact form takes those chunks only, level by level: in each block of 2^shift rows,
queries of the second half meet keys of the first through the row between them, so every exponent is at most 0.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    OPEN,
    block_decay_matrix,
    dot,
    gate,
    load_rows,
    silu,
    span,
    store_rows,
    sum_rows,
)


@triton.jit(do_not_specialize=["T", "NT"])
def chunk_output_kernel(
    q,  # [B, T, H, K] raw
    f,  # [B, T, H, K] raw gate
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], of chunk_state_kernel
    slow,  # [chunks, H, K / BK] int8
    o,  # [B, T, H, V], out: o, or dv where REVERSE
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
    scale,
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
    EXACT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_h = pid % H
    i_c = pid // H
    i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
    place = i_c.to(tl.int64) * H + i_h
    if start >= end:
        return
    any_slow = tl.load(slow + place * NK)
    for i_k in tl.static_range(1, NK):
        any_slow = any_slow | tl.load(slow + place * NK + i_k)
    if (any_slow != 0) != EXACT:
        return

    o_c = tl.arange(0, C)
    i = o_c[:, None]
    j = o_c[None, :]
    o_t = start + o_c
    m_t = o_t < end
    o_v = tl.arange(0, BV)
    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_f = f + i_b * stride_fb + i_h * stride_fh
    p_y = y + i_b * stride_yb + i_h * stride_yh
    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    for i_k in tl.range(0, NK, num_stages=1):
        o_k = i_k * BK + tl.arange(0, BK)
        b = tl.zeros([1, BK], tl.float32)
        if BOUNDED:
            b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)[None, :]
        g, k = gate(load_rows(p_f, stride_ft, o_t, o_k, m_t, K, OPEN).to(tl.float32), b)
        b_q = silu(load_rows(p_q, stride_qt, o_t, o_k, m_t, K, 0.0).to(tl.float32), scale)
        m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_h = tl.load(states + place * K * V + o_k[:, None] * V + o_v[None, :], mask=m_kv, other=0.0).to(DT)

        decay = sum_rows(block_decay_matrix(i, j, LEVELS), g, DT)
        if EXACT:
            is_slow = tl.load(slow + place * NK + i_k) != 0
            # halve the blocks until their operands fit: at the bottom a block is one row
            shift = LEVELS
            for _ in tl.range(0, tl.where(is_slow, LEVELS, 0), num_stages=1):
                half = (1 << shift) >> 1
                second_i = (i & ((1 << shift) - 1)) >= half
                second_j = (j & ((1 << shift) - 1)) >= half
                operand = (tl.where(second_i, b_q, k) * tl.exp2(-tl.abs(decay))).to(DT)
                pair = ((i >> shift) == (j >> shift)) & (second_i != second_j) & (second_j if REVERSE else second_i)
                product = dot(operand, tl.trans(operand), tl.zeros([C, C], tl.float32))
                scores += tl.where(pair, product, 0.0)
                shift -= 1
                decay = sum_rows(block_decay_matrix(i, j, shift), g, DT)
            same = (i >> shift) == (j >> shift)
        else:
            same = i >= 0
        qd = (b_q * tl.exp2(decay)).to(DT)
        kd = (k * tl.exp2(-decay)).to(DT)
        # entries on the other side of the diagonal may be infinite: chosen away, never multiplied by 0
        if REVERSE:
            product = dot(kd, tl.trans(qd), tl.zeros([C, C], tl.float32))
            scores += tl.where((i <= j) & same, product, 0.0)
        else:
            product = dot(qd, tl.trans(kd), tl.zeros([C, C], tl.float32))
            scores += tl.where((i >= j) & same, product, 0.0)
        if EXACT:
            if is_slow:
                if REVERSE:
                    kd = (k * tl.exp2(sum_rows(tl.where(j > i, 1.0, 0.0), g, DT))).to(DT)
                else:
                    qd = (b_q * tl.exp2(sum_rows(tl.where(j <= i, 1.0, 0.0), g, DT))).to(DT)
        if REVERSE:
            out = dot(kd, b_h, out)
        else:
            out = dot(qd, b_h, out)
    b_y = load_rows(p_y, stride_yt, o_t, o_v, m_t, V, 0.0).to(DT)
    out = dot(scores.to(DT), b_y, out)
    p_o = o + i_b * stride_ob + i_h * stride_oh
    store_rows(p_o, stride_ot, o_t, o_v, m_t, V, out.to(o.dtype.element_ty))
