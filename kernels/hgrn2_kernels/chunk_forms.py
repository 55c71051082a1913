"""The three forms in which a chunk is computed, as functions that chunk_output.py and chunk_gradient.py share.

chunk_state has counted the bands that each chunk needs, and that count selects the form:

- Fast, for a chunk whose decay is within the limit. Its scores are one product, in the frame of the chunk's middle.
- Banded. Each channel divides its tokens into bands of decay, counted from the boundary of the chunk at which the state
  is. A score has two operands. The operand that is nearer to that boundary chooses the band in whose frame the two are
  multiplied. The other operand may fade in that frame, but does not grow beyond the limit.
- Exact, where too many bands would be needed. The scores are computed level by level: in each block of 2^shift tokens,
  queries of the second half meet keys of the first half through the token between them. So all exponents are at most 0.

Each form has a function for the scores and one for the sums of the backward. The backward needs one number P for each
token and channel, which the code calls `balance`: the query times its gradient, minus the key times its gradient. The
gradient of log gate t is the sum of P from token t on. A pair of tokens that both lie there contributes two terms to
this sum. They cancel, because the same rounded operands stand in both.
"""

import triton
import triton.language as tl

from hgrn2_kernels.triton_math import (
    LARGEST,
    LARGEST_FP32,
    column,
    dot,
    exp2,
    frame,
    in_band,
    limit,
    load_matrix,
    reciprocal,
    rounded,
    sum_all_gates,
    sum_gates,
)


@triton.jit
def fast_scores(scores, g, a, k, sums, m_causal, C: tl.constexpr, DT: tl.constexpr, REVERSE: tl.constexpr):
    """Add the scores of a block of channels in the fast form.

    Returns the scores [C, C], and the operand [BK, C] that also reads the state.
    """
    zero = tl.zeros([C, C], tl.float32)
    decay = sum_gates(g, load_matrix(sums, 0, C), False)
    qd = (a * exp2(decay)).to(DT)
    kd = (k * exp2(-decay)).to(DT)
    read = kd if REVERSE else qd
    product = dot(tl.trans(kd), qd, zero) if REVERSE else dot(tl.trans(qd), kd, zero)
    # Entries on the other side of the diagonal may be infinite. They are replaced, and never multiplied by 0.
    scores += tl.where(m_causal, product, 0.0)
    return scores, read


@triton.jit
def banded_scores(scores, e, read, reader, writer, p_bands, DT: tl.constexpr):
    """Add the scores of a block of channels in the banded form, before the causal mask.

    Args:
        e: [BK, C], log2 decay between each token and the boundary, in the frame of the state.
        read: [BK, C], the reader in the frame of the first band, which is the frame of the state.
        reader, writer: [BK, C], the operand of a score that reads the state, and the other one.
        p_bands: pointer to the count of bands of these channels.
    """
    # The caller masks the sum at the end, because products with readers before the band are not causal and may be
    # infinite.
    written = tl.where(in_band(e, DT), writer * exp2(-e), 0.0).to(DT)
    scores = dot(tl.trans(read), written, scores)
    for _ in tl.range(1, tl.load(p_bands).to(tl.int32), num_stages=1):
        e += 2 * limit(DT)
        read = (reader * exp2(tl.minimum(e, limit(DT)))).to(DT)
        written = tl.where(in_band(e, DT), writer * exp2(-e), 0.0).to(DT)
        scores = dot(tl.trans(read), written, scores)
    return scores


@triton.jit
def exact_scores(scores, g, a, k, sums, m_causal, o_i, o_j, C: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr):
    """Add the scores of a block of channels in the exact form."""
    zero = tl.zeros([C, C], tl.float32)
    apart = tl.where(m_causal, o_i ^ o_j, 0)
    shift = LEVELS
    for _ in tl.range(0, LEVELS, num_stages=1):
        decay = sum_gates(g, load_matrix(sums, shift, C), False)
        shift -= 1
        m_second = ((o_j >> shift) & 1) != 0
        operand = (tl.where(m_second, a, k) * exp2(decay)).to(DT)
        # two tokens meet at the level of the highest bit in which their numbers differ
        product = dot(tl.trans(operand), operand, zero)
        scores += tl.where((apart >> shift) == 1, product, 0.0)
    scores += tl.where(o_i == o_j, dot(tl.trans(a.to(DT)), k.to(DT), zero), 0.0)
    return scores


@triton.jit
def fast_sums(g, a, k, b_h, b_dh, b_v, b_do, dscores, sums, DT: tl.constexpr):
    """Sum up the gradients of decayed queries and keys in the fast form.

    Returns, each [BK, C] fp32:
        dq_sum: the gradient of a.
        k_dk: the key times its gradient.
        balance: see the top of this file.
        written: the part of k_dk that comes from the gradient of the state after the chunk.
        all_written: the sum of written over the tokens, [BK, 1]; only for 16-bit products.
    """
    C: tl.constexpr = g.shape[1]
    zero = tl.zeros([g.shape[0], C], tl.float32)
    decay = sum_gates(g, load_matrix(sums, 0, C), False)
    factor = exp2(decay)
    qd = rounded(a * factor, DT)
    kd = rounded(k * exp2(-decay), DT)
    raw = dot(b_dh.to(DT), tl.trans(b_v), zero)
    written = kd * raw
    all_written = written
    if DT != tl.float32:
        all_written = tl.sum(written, 1)[:, None]
    raw = dot(qd.to(DT), dscores, raw)
    k_dk = kd * raw
    raw = dot(kd.to(DT), tl.trans(dscores), dot(b_h.to(DT), tl.trans(b_do), zero))
    dq_sum = raw * factor
    balance = qd * raw - k_dk
    if DT == tl.float32:
        balance += written
    return dq_sum, k_dk, balance, written, all_written


@triton.jit
def banded_sums(g, a, k, b_h, b_do, dscores, n_bands, sums, LEVELS: tl.constexpr, DT: tl.constexpr):
    """Sum up the gradients of decayed queries and keys in the banded form.

    Returns:
        dq_sum, balance: [BK, C], as in fast_sums.
        k_dk: [BK, C], as in fast_sums but without written, which the caller adds.
        k, e_floor: [BK, C], the rounded key and the exponent of its frame.
        whole, framed: [BK, 1], log2 decay of the chunk, and the part of it that the stored states carry.
    """
    C: tl.constexpr = g.shape[1]
    zero = tl.zeros([g.shape[0], C], tl.float32)
    earlier = sum_gates(g, load_matrix(sums, LEVELS + 1, C), False)
    whole = column(earlier, C - 1)[:, None]
    framed = frame(whole, DT)
    # Exponents are rounded to 2^-13, so that the steps from band to band are exact. Bands are separated at whole powers
    # of two. So an operand is rounded once for all bands, and one sum per side serves dq, df and the balance.
    e = (earlier - framed + 1536.0) - 1536.0
    e_floor = tl.floor(e)
    rest = exp2(e - e_floor)
    a = rounded(a * rest, DT)
    k = rounded(k * reciprocal(rest), DT)
    q_sum = exp2(e_floor) * dot(b_h.to(DT), tl.trans(b_do), zero)
    k_sum = zero
    for _ in tl.range(0, n_bands, num_stages=1):
        e_floor = tl.floor(e)
        # The same factor is computed twice, in two ways, so that the compiler does not keep it in registers.
        qd = a * tl.minimum(exp2(e_floor), LARGEST_FP32 if DT == tl.float32 else LARGEST)
        inverse = tl.where(in_band(e_floor, DT), exp2(-e_floor), 0.0)
        k_sum += dot(qd.to(DT), dscores, zero) * inverse
        product = dot((k * inverse).to(DT), tl.trans(dscores), zero)
        q_sum += product * exp2(tl.minimum(e_floor, limit(DT)))
        e += 2 * limit(DT)
    e -= n_bands * (2 * limit(DT))
    e_floor = tl.floor(e)
    dq_sum = q_sum * exp2(e - e_floor)
    k_dk = k * k_sum
    balance = a * q_sum - k_dk
    return dq_sum, k_dk, balance, k, e_floor, whole, framed


@triton.jit
def exact_sums(
    g, a, k, b_h, b_dh, b_v, b_do, dscores, diagonal, o_i, o_j, sums, ones, LEVELS: tl.constexpr, DT: tl.constexpr
):
    """Sum up the gradients of decayed queries and keys in the exact form.

    diagonal [1, C] holds the gradients of the scores of each token with itself, and dscores holds the other gradients.
    The results are named as in fast_sums and banded_sums.
    """
    C: tl.constexpr = g.shape[1]
    zero = tl.zeros([g.shape[0], C], tl.float32)
    square = tl.zeros([C, C], tl.float32)
    # gradients of the scores of pairs, for either of the two tokens as the query
    dscores_t = tl.where(o_i < o_j, dot(b_v, tl.trans(b_do), square), 0.0)
    dpairs = tl.where(o_i > o_j, dscores.to(tl.float32), dscores_t).to(DT)
    dq_sum, dk_sum, balance = diagonal * k, diagonal * a, zero
    shift = LEVELS
    for _ in tl.range(0, LEVELS, num_stages=1):
        factor = exp2(sum_gates(g, load_matrix(sums, shift, C), True))
        shift -= 1
        m_second = ((o_j >> shift) & 1) != 0
        operand = rounded(tl.where(m_second, a, k) * factor, DT)
        # two tokens meet at the level of the highest bit in which their numbers differ
        raw = dot(operand.to(DT), tl.where(((o_i ^ o_j) >> shift) == 1, dpairs, 0.0), zero)
        signed = operand * raw
        balance += tl.where(m_second, signed, -signed)
        raw *= factor
        dq_sum += tl.where(m_second, raw, 0.0)
        dk_sum += tl.where(m_second, 0.0, raw)
    # these sums come after the loop, which needs the registers
    earlier = sum_gates(g, load_matrix(sums, LEVELS + 1, C), True)
    whole = column(earlier, C - 1)[:, None]
    # rounded as in chunk_state, which stored the states
    framed = frame(sum_all_gates(g, ones, C), DT)
    raw = exp2(earlier - framed) * dot(b_h.to(DT), tl.trans(b_do), zero)
    balance += a * raw
    dq_sum += raw
    later = sum_gates(g, load_matrix(sums, LEVELS + 2, C), True)
    raw = exp2(later - framed) * dot(b_dh.to(DT), tl.trans(b_v), zero)
    written = k * raw
    k_dk = k * (dk_sum + raw)
    return dq_sum, k_dk, balance, written, whole, framed
