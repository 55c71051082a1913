"""The outputs of a chunk from the state at its boundary: o in the forward, dv in the backward.

One program computes one (chunk, head), in one of the three forms of chunk_forms.py.
"""

import triton
import triton.language as tl

from hgrn2_kernels.chunk_forms import banded_scores, exact_scores, fast_scores
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


@triton.jit
def output_of(
    i_ch,
    q,
    f,
    y,
    bound,
    states,
    bands,
    o,
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
    FORM: tl.constexpr,
):
    """Compute the output of chunk and head i_ch in the form FORM. The arguments are those of chunk_output_kernel."""
    NK: tl.constexpr = (K + BK - 1) // BK
    o_v = tl.arange(0, BV)
    eye = load_matrix(ones, 0, C).to(q.dtype.element_ty)
    o_i = tl.arange(0, C)[:, None]
    o_j = tl.arange(0, C)[None, :]
    i_c, i_h = i_ch // H, (i_ch % H).to(tl.int64)
    i_state = i_ch.to(tl.int64)
    i_b, start, end = span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C, PACKED)
    t = start.to(tl.int64)
    n_tokens = end - start
    p_q = q + i_b * stride_qb + t * stride_qt + i_h * stride_qh
    p_f = f + i_b * stride_fb + t * stride_ft + i_h * stride_fh
    p_y = y + i_b * stride_yb + t * stride_yt + i_h * stride_yh
    if FULL and V == BV:
        # y is needed last, and there are no registers to load it early
        prefetch_rows(p_y, stride_yt, V, C)
        if FORM != FAST and K % BK == 0:
            # the loop over channels of these forms is not pipelined
            prefetch_rows(p_f, stride_ft, K, C)
            prefetch_rows(p_q, stride_qt, K, C)
            prefetch_rows(states + i_state * K * V, V, V, K)
    scores = tl.zeros([C, C], tl.float32)
    out = tl.zeros([C, BV], tl.float32)
    m_causal = (o_i <= o_j) if REVERSE else (o_i >= o_j)
    for i_k in tl.range(0, NK, num_stages=STAGES if FORM == FAST else 1):
        o_k = i_k * BK + tl.arange(0, BK)
        b_bound = tl.zeros([BK], tl.float32)
        if BOUNDED:
            b_bound = tl.load(bound + i_h * K + o_k, mask=o_k < K, other=0.0)
        b_f = load_tokens(p_f, stride_ft, o_k, n_tokens, K, BK, C, FULL)
        b_q = load_tokens(p_q, stride_qt, o_k, n_tokens, K, BK, C, FULL)
        m_kv = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_h = tl.load(states + i_state * K * V + o_k[:, None] * V + o_v[None, :], mask=m_kv, other=0.0)
        g, k = gate(padded(channels(b_f, eye), n_tokens, C, FULL), b_bound[:, None], DT)
        if FORM == FAST:
            a = silu(channels(b_q, eye), inverse_scale)
            scores, read = fast_scores(scores, g, a, k, sums, m_causal, C, DT, REVERSE)
        else:
            # decay to the boundary where the state is, minus the decay that the stored state already has
            matrix = load_matrix(sums, LEVELS + 2 if REVERSE else LEVELS + 1, C)
            e = sum_gates(g, matrix, FORM == BANDED) - frame(sum_all_gates(g, ones, C), DT)
            a = silu(channels(b_q, eye), inverse_scale)
            # the operand of a score that also reads the state, and the one that chunk_state writes to it
            reader, writer = (k, a) if REVERSE else (a, k)
            read = (reader * exp2(e)).to(DT)
        out = dot(tl.trans(read), b_h.to(DT), out)
        if FORM == BANDED:
            scores = banded_scores(scores, e, read, reader, writer, bands + i_state * NK + i_k, DT)
        if FORM == EXACT:
            scores = exact_scores(scores, g, a, k, sums, m_causal, o_i, o_j, C, LEVELS, DT)
    if FORM == BANDED:
        scores = tl.where(m_causal, scores, 0.0)
    b_y = load_tokens(p_y, stride_yt, o_v, n_tokens, V, BV, C, FULL).to(DT)
    rounded = scores.to(DT)
    if K < 64 and DT != tl.float32:
        # with so few channels, the rounding of the scores would be visible
        out = dot((scores - rounded.to(tl.float32)).to(DT), b_y, out)
    out = dot(rounded, b_y, out)
    p_o = o + i_b * stride_ob + t * stride_ot + i_h * stride_oh
    store_tokens(p_o, stride_ot, o_v, n_tokens, out.to(o.dtype.element_ty), V, BV, C, FULL)


@triton.jit
def no_output(
    i_ch,
    o,
    cu_seqlens,
    chunk_sequence,
    chunk_first,
    stride_ot,
    stride_oh,
    T,
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    FULL: tl.constexpr,
):
    """Write zeros for chunk and head i_ch, which lie after the last packed sequence."""
    o_v = tl.arange(0, BV)
    start = behind(i_ch // H, cu_seqlens, chunk_sequence, chunk_first, C)
    p_o = o + start.to(tl.int64) * stride_ot + (i_ch % H).to(tl.int64) * stride_oh
    store_tokens(p_o, stride_ot, o_v, T - start, tl.zeros([C, BV], o.dtype.element_ty), V, BV, C, FULL)


@triton.jit
def bands_of_chunk(bands, i_ch, NK: tl.constexpr):
    """Return the largest count of bands among the blocks of channels of chunk and head i_ch."""
    n_bands = tl.load(bands + i_ch * NK)
    for i in tl.static_range(1, NK):
        n_bands = tl.maximum(n_bands, tl.load(bands + i_ch * NK + i))
    return n_bands


@triton.jit(do_not_specialize=["T", "NT"])
def chunk_output_kernel(
    q,  # [B, T, H, K] raw queries
    f,  # [B, T, H, K] raw gates
    y,  # [B, T, H, V] v, or do where REVERSE
    bound,  # [H, K] fp32, read where BOUNDED
    states,  # [chunks, H, K, V], written by chunk_state_kernel
    bands,  # [chunks, H, K / BK] int8, written by chunk_state_kernel
    o,  # [B, T, H, V], out: o, or dv where REVERSE
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
    # the program computes chunk and head i_ch
    i_ch = tl.program_id(0)
    n_bands = bands_of_chunk(bands, i_ch, (K + BK - 1) // BK)
    form = form_of(n_bands)
    # This loop becomes three pieces of code, and a chunk runs one of them. Each piece computes all it needs. Values
    # from before the loop would be kept in registers for all three, and the fast form has no registers left.
    for FORM in tl.static_range(3):
        if form == FORM:
            # fmt: off
            output_of(
                i_ch, q, f, y, bound, states, bands, o, sums, ones, cu_seqlens, chunk_sequence, chunk_first,
                stride_qb, stride_qt, stride_qh, stride_fb, stride_ft, stride_fh, stride_yb, stride_yt, stride_yh,
                stride_ob, stride_ot, stride_oh, inverse_scale, T, NT, H, K, V, C, LEVELS, BK, BV, DT, REVERSE,
                BOUNDED, PACKED, FULL, STAGES, FORM,
            )
            # fmt: on
            return
    if PACKED:
        if n_bands == 0:
            # fmt: off
            no_output(
                i_ch, o, cu_seqlens, chunk_sequence, chunk_first, stride_ot, stride_oh, T, H, V, C, BV, FULL,
            )
            # fmt: on
