"""States between chunks: the sequential half of the chunkwise form, forward (h) and reverse (its gradient, dh).

One program owns a [BK, BV] tile of the state of one (segment, head) and walks the segment's chunks. A segment is a
whole sequence, or, where there are too few sequences and heads to fill a GPU, a part of it: then a first pass finds
what each segment adds to a state that passes it, segment_scan_kernel what enters each, and a second pass the rest.

Every exponent here is at most 0, so that these kernels need no second form: a key is decayed to the end of its chunk,
a query from its start. A state is stored decayed to the middle of the chunk, where the fast form of the others works.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    bands_of,
    channels,
    column,
    dot,
    exp2,
    frame,
    gate,
    load_matrix,
    load_tokens,
    padded,
    silu,
    sum_gates,
    whole_matrix,
)


@triton.jit(do_not_specialize=["T", "NT", "SEGMENTS", "LENGTH"])
def chunk_state_kernel(
    q,  # [B, T, H, K] raw, read where REVERSE
    f,  # [B, T, H, K] raw gate
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    first,  # [segments, H, K, V] fp32: state before the segment (after it where REVERSE); read where HAS_FIRST
    first_rows,  # [segments] int32, the row of first that a segment takes, -1 for zeros; read where ROWS
    states,  # [chunks, H, K, V], out where STATES: the state entering each chunk (leaving it where REVERSE), framed
    bands,  # [chunks, H, K / BK] int8, out where STATES and not REVERSE: how many the chunk is cut into
    last,  # [segments, H, K, V] fp32, out where LAST: state after the segment (before it where REVERSE)
    decays,  # [segments, H, K] fp32, out where DECAYS: log2 decay of a state that passes the segment
    sums,
    ones,
    cu_seqlens,
    chunk_first,
    segment_sequence,  # [segments] int32, read where TABLED
    segment_first,  # [N + 1] int32, read where TABLED
    stride_qb,
    stride_qt,
    stride_qh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_yb,
    stride_yt,
    stride_yh,
    inverse_scale,
    T,
    NT,
    SEGMENTS,  # of a sequence, where not TABLED
    LENGTH,  # chunks of a segment
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    STATES: tl.constexpr,
    LAST: tl.constexpr,
    DECAYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    TABLED: tl.constexpr,  # packed sequences are cut
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_k = (pid // NV) % NK
    i_h = ((pid // (NV * NK)) % H).to(tl.int64)
    i_s = (pid // (NV * NK * H)).to(tl.int64)
    if TABLED:
        i_n = tl.load(segment_sequence + i_s).to(tl.int64)
        skipped = (i_s - tl.load(segment_first + i_n)).to(tl.int32) * LENGTH
    else:
        i_n = i_s // SEGMENTS
        skipped = (i_s % SEGMENTS).to(tl.int32) * LENGTH
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

    steps = tl.maximum(tl.minimum(steps - skipped, LENGTH), 0)
    start += skipped * C
    chunk += skipped

    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    # gates between a token and the end of the chunk that its part of the state is written at
    matrix = load_matrix(sums, LEVELS + 1 if REVERSE else LEVELS + 2, C)
    all_tokens = whole_matrix(C, DT)
    eye = load_matrix(ones, 0, C).to(f.dtype.element_ty)
    b = tl.zeros([BK], tl.float32)
    if BOUNDED:
        b = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)

    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_f = f + i_b * stride_fb + i_h * stride_fh
    p_y = y + i_b * stride_yb + i_h * stride_yh
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        row = tl.load(first_rows + i_s).to(tl.int64) if ROWS else i_s
        state = tl.load(first + (row * H + i_h) * K * V + o_kv, mask=m_kv & (row >= 0), other=0.0)
    passed = tl.zeros([BK], tl.float32)

    for step in tl.range(0, steps, num_stages=STAGES):
        i_t = steps - 1 - step if REVERSE else step
        t = (start + i_t * C).to(tl.int64)
        left = end - start - i_t * C
        b_f = load_tokens(p_f + t * stride_ft, stride_ft, o_k, left, K, BK, C, FULL)
        b_y = load_tokens(p_y + t * stride_yt, stride_yt, o_v, left, V, BV, C, FULL).to(DT)
        g, k = gate(padded(channels(b_f, eye), left, C, FULL), b[:, None], DT)
        decay = sum_gates(g, matrix, False)
        whole = column(sum_gates(g, all_tokens, False), 0)

        if STATES:
            place = (chunk + i_t) * H + i_h
            stored = state * exp2(frame(whole, DT))[:, None]
            tl.store(states + place * K * V + o_kv, stored.to(states.dtype.element_ty), mask=m_kv)
            if not REVERSE:
                tl.store(bands + place * NK + i_k, bands_of(whole, DT).to(tl.int8))
        if DECAYS:
            passed += whole

        if REVERSE:
            b_q = load_tokens(p_q + t * stride_qt, stride_qt, o_k, left, K, BK, C, FULL)
            operand = (silu(channels(b_q, eye), inverse_scale) * exp2(decay)).to(DT)
        else:
            operand = (k * exp2(decay)).to(DT)
        state = dot(operand, b_y, state * exp2(whole)[:, None])

    if LAST:
        tl.store(last + (i_s * H + i_h) * K * V + o_kv, state, mask=m_kv)
    if DECAYS:
        tl.store(decays + (i_s * H + i_h) * K + o_k, passed, mask=o_k < K)


@triton.jit(do_not_specialize=["SEGMENTS"])
def segment_scan_kernel(
    first,  # [N, H, K, V] fp32: state before the first segment (after the last where REVERSE); read where HAS_FIRST
    first_rows,  # [N] int32, the row of first that a sequence takes, -1 for zeros; read where ROWS
    states,  # [segments, H, K, V] fp32: what each segment adds to a state; in place, the state that enters it
    decays,  # [segments, H, K] fp32, log2
    last,  # [N, H, K, V] fp32, out
    total,  # [N, H, K] fp32, out: log2 decay of a sequence
    segment_first,  # [N + 1] int32, read where TABLED
    SEGMENTS,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    TABLED: tl.constexpr,
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
        row = tl.load(first_rows + i_n).to(tl.int64) if ROWS else i_n
        state = tl.load(first + (row * H + i_h) * K * V + o_kv, mask=mask & (row >= 0), other=0.0)
    begin, end = i_n * SEGMENTS, (i_n + 1) * SEGMENTS
    if TABLED:
        begin = tl.load(segment_first + i_n).to(tl.int64)
        end = tl.load(segment_first + i_n + 1).to(tl.int64)
    passed = tl.zeros([BK], tl.float32)
    for step in range(end - begin):
        place = (end - 1 - step if REVERSE else begin + step) * H + i_h
        added = tl.load(states + place * K * V + o_kv, mask=mask, other=0.0)
        decay = tl.load(decays + place * K + o_k, mask=o_k < K, other=0.0)
        tl.store(states + place * K * V + o_kv, state, mask=mask)
        state = state * exp2(decay)[:, None] + added
        passed += decay
    tl.store(last + i_nh * K * V + o_kv, state, mask=mask)
    tl.store(total + i_nh * K + o_k, passed, mask=o_k < K)
