"""The states between chunks: the sequential half of the chunkwise form, forward (h) and in reverse (its gradient, dh).

One program owns a [BK, BV] tile of the state of one (segment, head) and walks the chunks of the segment in order. A
segment is a whole sequence, or a part of it where there are too few sequences and heads to fill a GPU. Then there are
three passes: a first walk finds what each segment adds to a state that passes it, segment_scan_kernel finds the state
that enters each segment, and a second walk stores the states.

All exponents here are at most 0, so these kernels need only one form: a key is decayed to the end of its chunk, and a
query from its start. A state is stored with the decay to the middle of the chunk, where the fast form of the other
kernels works. The forward walk also counts the bands of each chunk, and so decides in which form the other kernels
compute it.
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


@triton.jit(do_not_specialize=["T", "NT", "SEGMENTS", "LEFT_OUT", "LENGTH"])
def chunk_state_kernel(
    q,  # [B, T, H, K] raw, read where REVERSE
    f,  # [B, T, H, K] raw gate
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    initial,  # [segments, H, K, V] fp32: state before the segment (after it where REVERSE); read where HAS_INITIAL
    initial_rows,  # [segments] int32, the row of initial that a segment takes, -1 for zeros; read where ROWS
    states,  # [chunks, H, K, V], out where STATES: the state entering each chunk (leaving it where REVERSE), see frame
    bands,  # [chunks, H, K / BK] int8, out where STATES and not REVERSE: how many bands the chunk is cut into
    final,  # [segments, H, K, V] fp32, out where FINAL: state after the segment (before it where REVERSE)
    decays,  # [segments, H, K] fp32, out where DECAYS: log2 decay of a state that passes the segment
    sums,
    ones,
    cu_seqlens,  # [N + 1] int32, read where PACKED
    chunk_first,  # [N + 1] int32, the first chunk of each sequence; read where PACKED
    segment_sequence,  # [segments] int32, the sequence of each segment; read where TABLED
    segment_first,  # [N + 1] int32, the first segment of each sequence; read where TABLED
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
    SEGMENTS,  # segments per sequence, where not TABLED
    LEFT_OUT,  # 1 if no program walks the last segment of a sequence (the first where REVERSE), else 0
    LENGTH,  # chunks per segment
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
    FINAL: tl.constexpr,
    DECAYS: tl.constexpr,
    BOUNDED: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    ROWS: tl.constexpr,
    PACKED: tl.constexpr,
    TABLED: tl.constexpr,  # packed sequences are cut into segments
    FULL: tl.constexpr,  # every chunk has C tokens
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
        n_before = (i_s - tl.load(segment_first + i_n)).to(tl.int32) * LENGTH
    else:
        walked = SEGMENTS - LEFT_OUT
        i_n, i_in = i_s // walked, i_s % walked
        if REVERSE:
            i_in += LEFT_OUT
        i_s = i_n * SEGMENTS + i_in
        n_before = i_in.to(tl.int32) * LENGTH
    if PACKED:
        i_b = i_n * 0
        start = tl.load(cu_seqlens + i_n)
        end = tl.load(cu_seqlens + i_n + 1)
        i_first = tl.load(chunk_first + i_n).to(tl.int64)
        n_chunks = tl.cdiv(end - start, C)
    else:
        i_b = i_n
        start = 0
        end = T
        i_first = i_n * NT
        n_chunks = NT

    # the segment has at most LENGTH chunks, which follow the first n_before chunks of its sequence
    n_chunks = tl.maximum(tl.minimum(n_chunks - n_before, LENGTH), 0)
    start += n_before * C
    i_first += n_before

    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    # sums the gates between a token and the end of the chunk at which its write joins the state
    matrix = load_matrix(sums, LEVELS + 1 if REVERSE else LEVELS + 2, C)
    all_tokens = whole_matrix(C, DT)
    eye = load_matrix(ones, 0, C).to(f.dtype.element_ty)
    b_bound = tl.zeros([BK], tl.float32)
    if BOUNDED:
        b_bound = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)

    p_q = q + i_b * stride_qb + i_h * stride_qh
    p_f = f + i_b * stride_fb + i_h * stride_fh
    p_y = y + i_b * stride_yb + i_h * stride_yh
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        i_row = tl.load(initial_rows + i_s).to(tl.int64) if ROWS else i_s
        state = tl.load(initial + (i_row * H + i_h) * K * V + o_kv, mask=m_kv & (i_row >= 0), other=0.0)
    passed = tl.zeros([BK], tl.float32)

    for i_step in tl.range(0, n_chunks, num_stages=STAGES):
        i_c = n_chunks - 1 - i_step if REVERSE else i_step
        t = (start + i_c * C).to(tl.int64)
        n_tokens = end - start - i_c * C
        b_f = load_tokens(p_f + t * stride_ft, stride_ft, o_k, n_tokens, K, BK, C, FULL)
        b_y = load_tokens(p_y + t * stride_yt, stride_yt, o_v, n_tokens, V, BV, C, FULL).to(DT)
        g, k = gate(padded(channels(b_f, eye), n_tokens, C, FULL), b_bound[:, None], DT)
        decay = sum_gates(g, matrix, False)
        whole = column(sum_gates(g, all_tokens, False), 0)

        if STATES:
            i_ch = (i_first + i_c) * H + i_h
            b_h = state * exp2(frame(whole, DT))[:, None]
            tl.store(states + i_ch * K * V + o_kv, b_h.to(states.dtype.element_ty), mask=m_kv)
            if not REVERSE:
                tl.store(bands + i_ch * NK + i_k, bands_of(whole, DT).to(tl.int8))
        if DECAYS:
            passed += whole

        if REVERSE:
            b_q = load_tokens(p_q + t * stride_qt, stride_qt, o_k, n_tokens, K, BK, C, FULL)
            operand = (silu(channels(b_q, eye), inverse_scale) * exp2(decay)).to(DT)
        else:
            operand = (k * exp2(decay)).to(DT)
        state = dot(operand, b_y, state * exp2(whole)[:, None])

    if FINAL:
        tl.store(final + (i_s * H + i_h) * K * V + o_kv, state, mask=m_kv)
    if DECAYS:
        tl.store(decays + (i_s * H + i_h) * K + o_k, passed, mask=o_k < K)


@triton.jit(do_not_specialize=["SEGMENTS", "LEFT_OUT"])
def segment_scan_kernel(
    initial,  # [N, H, K, V] fp32: state before the first segment (after the last if REVERSE); read where HAS_INITIAL
    initial_rows,  # [N] int32, the row of initial that a sequence takes, -1 for zeros; read where ROWS
    states,  # [segments, H, K, V] fp32: what each segment adds to a state; out, the state that enters it
    decays,  # [segments, H, K] fp32: log2 decay of a state that passes the segment
    final,  # [N, H, K, V] fp32, out: state after each sequence (before it where REVERSE)
    total,  # [N, H, K] fp32, out: log2 decay of each sequence
    segment_first,  # [N + 1] int32, the first segment of each sequence; read where TABLED
    SEGMENTS,
    LEFT_OUT,  # as in chunk_state_kernel; if it is 1, final and total do not count the segment left out
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    ROWS: tl.constexpr,
    TABLED: tl.constexpr,
):
    """Step the state over the segments of a sequence. One program owns one (sequence, head, tile of the state)."""
    i_nh = tl.program_id(0).to(tl.int64)
    i_n, i_h = i_nh // H, i_nh % H
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    state = tl.zeros([BK, BV], tl.float32)
    if HAS_INITIAL:
        i_row = tl.load(initial_rows + i_n).to(tl.int64) if ROWS else i_n
        state = tl.load(initial + (i_row * H + i_h) * K * V + o_kv, mask=m_kv & (i_row >= 0), other=0.0)
    i_first, i_end = i_n * SEGMENTS, (i_n + 1) * SEGMENTS
    if TABLED:
        i_first = tl.load(segment_first + i_n).to(tl.int64)
        i_end = tl.load(segment_first + i_n + 1).to(tl.int64)
    passed = tl.zeros([BK], tl.float32)
    for i_step in range(i_end - i_first):
        i_sh = (i_end - 1 - i_step if REVERSE else i_first + i_step) * H + i_h
        is_walked = i_step + LEFT_OUT < i_end - i_first
        b_added = tl.load(states + i_sh * K * V + o_kv, mask=m_kv & is_walked, other=0.0)
        b_decay = tl.load(decays + i_sh * K + o_k, mask=(o_k < K) & is_walked, other=0.0)
        tl.store(states + i_sh * K * V + o_kv, state, mask=m_kv)
        state = state * exp2(b_decay)[:, None] + b_added
        passed += b_decay
    tl.store(final + i_nh * K * V + o_kv, state, mask=m_kv)
    tl.store(total + i_nh * K + o_k, passed, mask=o_k < K)
