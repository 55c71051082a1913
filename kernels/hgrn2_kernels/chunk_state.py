"""States between chunks: the sequential half of the chunkwise form, forward (h) and reverse (its gradient, dh).

One program owns a [BK, BV] tile of the state of one (segment, head) and walks the segment's chunks. A segment is a
whole sequence, or, where there are too few sequences and heads to fill a GPU, a part of it: then a first pass finds
what each segment adds to a state that passes it, segment_scan_kernel what enters each, and a second pass the rest.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import LIMIT, OPEN, dot, gate, load_rows, silu, sum_rows


@triton.jit(do_not_specialize=["T", "NT", "SEGMENTS", "LENGTH"])
def chunk_state_kernel(
    x,  # [B, T, H, K] raw q where REVERSE, unused otherwise
    f,  # [B, T, H, K] raw gate
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    first,  # [segments, H, K, V] fp32: state before the segment (after it where REVERSE); read where HAS_FIRST
    states,  # [chunks, H, K, V], out where STORE: the state entering each chunk (leaving it where REVERSE), framed
    slow,  # [chunks, H, K / BK] int8: whether the chunk exceeds the fast path's limit; out, read where REVERSE
    last,  # [segments, H, K, V] fp32, out: state after the segment (before it where REVERSE)
    decays,  # [segments, H, K] fp32, out where not STORE: log2 decay of a state that passes the segment
    cu_seqlens,
    chunk_first,
    stride_xb,
    stride_xt,
    stride_xh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_yb,
    stride_yt,
    stride_yh,
    scale,
    T,
    NT,
    SEGMENTS,  # of a sequence
    LENGTH,  # chunks of a segment
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    PACKED: tl.constexpr,
    STAGES: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_h = (pid // (NV * NK)) % H
    i_s = (pid // (NV * NK * H)).to(tl.int64)
    i_n = i_s // SEGMENTS
    if PACKED:
        i_b = i_n * 0
        start = tl.load(cu_seqlens + i_n)
        end = tl.load(cu_seqlens + i_n + 1)
        chunk = tl.load(chunk_first + i_n).to(tl.int64)
        steps = tl.cdiv(end - start, C)
    else:
        i_b = i_n
        start = 0
        end = T
        chunk = i_n * NT
        steps = NT

    skipped = (i_s % SEGMENTS).to(tl.int32) * LENGTH
    steps = tl.maximum(tl.minimum(steps - skipped, LENGTH), 0)

    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    o_c = tl.arange(0, C)
    i = o_c[:, None]
    j = o_c[None, :]
    # decay between a token and the end of the chunk the state is written at, and the token's own for queries
    if REVERSE:
        matrix = tl.where(j <= i, 1.0, 0.0)
    else:
        matrix = tl.where(j > i, 1.0, 0.0)
    # columns 0 and 1 sum the first and second half of a chunk, in the layout of the state's rows
    o_16 = tl.arange(0, 16)[None, :]
    halves = tl.where((o_16 == 0) & (i < C // 2), 1.0, tl.where((o_16 == 1) & (i >= C // 2), 1.0, 0.0))
    b = tl.zeros([1, BK], tl.float32)
    if BOUNDED:
        b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)[None, :]

    p_x = x + i_b * stride_xb + i_h * stride_xh
    p_f = f + i_b * stride_fb + i_h * stride_fh
    p_y = y + i_b * stride_yb + i_h * stride_yh
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        state = tl.load(first + (i_s * H + i_h) * K * V + o_kv, mask=m_kv, other=0.0)
    passed = tl.zeros([BK], tl.float32)

    for step in tl.range(0, steps, num_stages=STAGES):
        i_t = skipped + (steps - 1 - step if REVERSE else step)
        o_t = start + i_t * C + o_c
        m_t = o_t < end
        b_f = load_rows(p_f, stride_ft, o_t, o_k, m_t, K, OPEN).to(tl.float32)
        b_y = load_rows(p_y, stride_yt, o_t, o_v, m_t, V, 0.0).to(DT)
        g, k = gate(b_f, b)
        decay = sum_rows(matrix, g, DT)
        # [BK, 16]: total decay of each half, per state row
        if DT == tl.float32:
            total = dot(tl.trans(g), halves, tl.zeros([BK, 16], tl.float32))
        else:
            hi = g.to(DT)
            lo = (g - hi.to(tl.float32)).to(DT)
            total = dot(tl.trans(hi), halves.to(DT), tl.zeros([BK, 16], tl.float32))
            total = dot(tl.trans(lo), halves.to(DT), total)
        first_half = tl.sum(tl.where(o_16 == 0, total, 0.0), 1)
        second_half = tl.sum(tl.where(o_16 == 1, total, 0.0), 1)
        whole = tl.exp2(first_half + second_half)[:, None]

        if STORE:
            place = (chunk + i_t) * H + i_h
            if REVERSE:
                is_slow = tl.load(slow + place * NK + i_k) != 0
                frame = second_half
            else:
                is_slow = tl.min(tl.minimum(first_half, second_half), 0) < -LIMIT
                tl.store(slow + place * NK + i_k, is_slow.to(tl.int8))
                frame = first_half
            # the fast path reads states decayed to the middle of the chunk, the exact path as they are
            framed = state * tl.where(is_slow, 1.0, tl.exp2(frame))[:, None]
            tl.store(states + place * K * V + o_kv, framed.to(states.dtype.element_ty), mask=m_kv)
        else:
            passed += first_half + second_half

        if REVERSE:
            b_x = load_rows(p_x, stride_xt, o_t, o_k, m_t, K, 0.0).to(tl.float32)
            operand = (silu(b_x, scale) * tl.exp2(decay)).to(DT)
        else:
            operand = (k * tl.exp2(decay)).to(DT)
        state = dot(tl.trans(operand), b_y, state * whole)

    tl.store(last + (i_s * H + i_h) * K * V + o_kv, state, mask=m_kv)
    if not STORE:
        tl.store(decays + (i_s * H + i_h) * K + o_k, passed, mask=o_k < K)


@triton.jit(do_not_specialize=["SEGMENTS"])
def segment_scan_kernel(
    first,  # [N, H, K, V] fp32: state before the first segment (after the last where REVERSE); read where HAS_FIRST
    states,  # [N, SEGMENTS, H, K, V] fp32: what each segment adds to a state; in place, the state that enters it
    decays,  # [N, SEGMENTS, H, K] fp32, log2
    last,  # [N, H, K, V] fp32, out
    SEGMENTS,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
):
    """One program a (sequence, head, tile) steps the state over the segments."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    mask = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        state = tl.load(first + i_nh * K * V + o_kv, mask=mask, other=0.0)
    for step in range(SEGMENTS):
        i_s = SEGMENTS - 1 - step if REVERSE else step
        place = (i_n * SEGMENTS + i_s) * H + i_h
        added = tl.load(states + place * K * V + o_kv, mask=mask, other=0.0)
        decay = tl.load(decays + place * K + o_k, mask=o_k < K, other=0.0)
        tl.store(states + place * K * V + o_kv, state, mask=mask)
        state = state * tl.exp2(decay)[:, None] + added
    tl.store(last + i_nh * K * V + o_kv, state, mask=mask)
