"""The functions that all Triton kernels of the chunkwise form share: gates, decays, and loads that mask padding.

Logarithms are base 2 inside the kernels, because the GPU computes exponentials and logarithms in base 2. Tiles hold
channels in rows and tokens in columns. A sum over the tokens of a chunk is then a product whose left operand stays in
the registers where the gates were computed, and a factor per channel scales a row of the state.

All kernels, here and in the other files, name their variables in the same way:

    i_   one index: i_h is a head, i_c a chunk, i_k a block of channels of K, i_ch a chunk and a head together.
    n_   a count: n_tokens are the tokens of the chunk that exist, n_bands the bands of the chunk.
    o_   a tile of offsets: o_k are channels of K, o_v channels of V, o_t tokens of the chunk, o_kv places in a state.
         In a tile [C, C] of scores, the rows are the tokens o_i and the columns are the tokens o_j.
    m_   a mask: a tile (or one value) that is true where the offsets exist or where a rule holds.
    p_   a pointer, or a tile of pointers.
    b_   a tile as it was loaded from an input, or as it will be stored in an output.

Intermediate tiles have plain names, which mean the same everywhere: g is the log gate, k the key, a the activated
query, and qd and kd are the query and the key with their decay. Names in capitals are known when the
kernel is compiled. `sums` and `ones` are the constant matrices of matrices.py.
"""

import os

import triton
import triton.language as tl

# The interpreter cannot run inline assembly. Triton chooses the interpreter when it decorates a kernel, so this is
# read when the module is imported.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# The raw gate of a padding token. It is so open that the state passes unchanged: forget is 1 and the key is 0.
OPEN = tl.constexpr(1.0e4)
# The largest decay, in powers of two, between the middle of a chunk (or of a band) and its ends. One operand carries
# the decay and the other its inverse. Both have to stay within the exponents of bf16, with room for their product.
LIMIT = tl.constexpr(96.0)
# The same limit for fp32, where rounding errors of larger decays would be visible.
LIMIT_FP32 = tl.constexpr(20.0)
LARGEST, LARGEST_FP32 = tl.constexpr(2.0**LIMIT.value), tl.constexpr(2.0**LIMIT_FP32.value)
# The most bands that a chunk is cut into. With more bands, closed gates would leave less of the other tokens than the
# rounding error with which a token reads its own write, and the exact form is hardly slower. In fp32 this happens with
# two bands.
BANDS = tl.constexpr(4)
BANDS_FP32 = tl.constexpr(1)
# The three forms in which a chunk is computed: one product, one product per band, or exact.
FAST, BANDED, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Units per power of two of a log gate in fp16. Log gates lie in [-125, 0], and in these units they keep 11 bits down to
# 2^-23.
UNIT = tl.constexpr(512.0)


@triton.jit
def log2(x):
    """Return the base-2 logarithm. tl.log2 calls a library routine that is several times slower."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp2(x):
    """Return the base-2 exponential, and 0 below 2^-126. tl.exp2 spends three more instructions on such results."""
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """Return 1 / x, approximately."""
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid_parts(x):
    """Return (e, r) with sigmoid(x) = e r and sigmoid(-x) = r.

    Both have a small relative error, and both are finite for any finite x.
    """
    e = exp2(tl.minimum(tl.maximum(x * LOG2E, -125.0), 125.0))
    return e, reciprocal(1.0 + e)


@triton.jit
def gate(x, b_bound, DT: tl.constexpr):
    """Turn raw gates x and lower bounds into (g, k): g = log2(forget) in [-125, 0], and k = 1 - forget.

    The fast logarithm has an absolute error of 2^-22. That is not enough for a gate near 1, whose memory is long. There
    a series of log(1 - k) replaces it, where k is below 1/128 for 16-bit products (DT is bf16; a relative error of
    2^-15 is enough, because the sums keep 11 bits) and below 1/32 for fp32 (a relative error of 2^-22).
    """
    e = exp2(tl.maximum(x * LOG2E, -125.0))
    r = reciprocal(1.0 + e)
    k = (1.0 - b_bound) * r
    if DT == tl.float32:
        near = 0.03125
        series = k * (-LOG2E - k * (0.5 * LOG2E + k * (0.33333333 * LOG2E + k * (0.25 * LOG2E))))
    else:
        near = 0.0078125
        series = k * (-LOG2E - k * (0.5 * LOG2E))
    # where a gate is so open that e is infinite, k is 0 and the series is chosen
    return tl.where(k < near, series, log2((b_bound + e) * r)), k


@triton.jit
def silu(x, inverse_scale):
    """Return silu(x) / inverse_scale."""
    return x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))


@triton.jit
def dot(a, b, acc):
    """Return acc + a b. Operands in fp32 are multiplied in fp32, not in TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_matrix(matrices, i, C: tl.constexpr):
    """Load matrix i of a stack [_, C, C]; see matrices.py."""
    o_t = tl.arange(0, C)
    return tl.load(matrices + i * C * C + o_t[:, None] * C + o_t[None, :])


@triton.jit
def sum_gates(g, matrix, FINE: tl.constexpr):
    """Return decays: the product of log gates g [D, C] and a matrix [C, N] of 0 and plus or minus one unit.

    For 16-bit operands a unit is 1 / UNIT in fp16, and g is rounded to 11 bits, or to 22 bits where FINE. Eleven bits
    are more than a raw gate in bf16 has. But where every gate is closed, a decay of 2^-40 may be all that is left of a
    token, and with 11 bits it would have an error of a percent.
    """
    zero = tl.zeros([g.shape[0], matrix.shape[1]], tl.float32)
    if matrix.dtype == tl.float32:
        return dot(g, matrix, zero)
    else:
        units = g * UNIT
        hi = units.to(tl.float16)
        if FINE:
            zero = dot((units - hi.to(tl.float32)).to(tl.float16), matrix, zero)
        return dot(hi, matrix, zero)


@triton.jit
def sum_all_gates(g, ones, C: tl.constexpr):
    """Return the decay of a whole chunk of log gates g [D, C], rounded as sum_gates does without FINE.

    The result is [D, 1], or [D, C] with equal columns.
    """
    if ones.dtype.element_ty == tl.float32:
        # a reduction would pass its result through shared memory, and write it there more than once
        return sum_tokens(g, load_matrix(ones, 4, C))
    else:
        return tl.sum((g * UNIT).to(tl.float16).to(tl.float32), 1)[:, None] * (1.0 / UNIT)


@triton.jit
def upper_half(bits):
    """Return the upper 16 bits of an int32 as fp32, a number that bf16 holds exactly.

    A conversion to bf16 and back takes three instructions, and the first runs at an eighth of the usual rate.
    """
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, DT: tl.constexpr):
    """Round fp32 x to the nearest number of DT, and return it in fp32. A tie is rounded away from 0."""
    if DT == tl.float32:
        return x
    else:
        return upper_half(x.to(tl.int32, bitcast=True) + 32768)


@triton.jit
def sum_tokens(x, matrix):
    """Return the product of fp32 x [D, C] and a matrix [C, N] of 0 and 1, nearly as precisely as fp32 allows."""
    zero = tl.zeros([x.shape[0], matrix.shape[1]], tl.float32)
    if matrix.dtype == tl.float32:
        return dot(x, matrix, zero)
    else:
        hi = upper_half(x.to(tl.int32, bitcast=True))
        return dot((x - hi).to(matrix.dtype), matrix, dot(hi.to(matrix.dtype), matrix, zero))


@triton.jit
def limit(DT: tl.constexpr):
    """Return the largest decay, in powers of two, of one frame."""
    return LIMIT_FP32 if DT == tl.float32 else LIMIT


@triton.jit
def whole_matrix(C: tl.constexpr, DT: tl.constexpr):
    """Return a matrix [C, 16]. Each column of the product of log gates and this matrix is the whole chunk's decay."""
    if DT == tl.float32:
        return tl.full([C, 16], 1.0, tl.float32)
    else:
        return tl.full([C, 16], 1.0 / UNIT, tl.float16)


@triton.jit
def bands_of(whole, DT: tl.constexpr):
    """Return how many bands a chunk needs whose channels decay by `whole` [D].

    That is 1 within the limit, and BANDS + 1 where the chunk would need more than BANDS.
    """
    # The number 1.5 is a margin. It is needed because bands are separated at whole powers of two, and because the sums
    # of the other kernels may differ in the last digit.
    needed = ((tl.max(-whole, 0) + 1.5) * (0.5 / limit(DT))).to(tl.int32) + 1
    return tl.where(needed <= (BANDS_FP32 if DT == tl.float32 else BANDS), needed, BANDS + 1)


@triton.jit
def form_of(n_bands):
    """Return the form of a chunk with n_bands bands, or -1 with 0 bands: the chunk lies after the packed sequences."""
    return tl.where(n_bands < 1, -1, tl.where(n_bands == 1, FAST, tl.where(n_bands <= BANDS, BANDED, EXACT)))


@triton.jit
def in_band(e, DT: tl.constexpr):
    """Return where exponents e, in the frame of a band, belong to tokens of that band. Every token is in one band."""
    return (e <= limit(DT)) & (e > -limit(DT))


@triton.jit
def column(x, INDEX: tl.constexpr):
    """Return column INDEX of a tile [D, C]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == INDEX)[None, :], x, 0.0), 1)


@triton.jit
def frame(whole, DT: tl.constexpr):
    """Return the decay that a stored state carries, for a chunk that decays by `whole`.

    It leads to the middle of the chunk, but not further than the limit.
    """
    return tl.maximum(0.5 * whole, -limit(DT))


@triton.jit
def span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Return where chunk i_c lies: the batch row, the first token, and the end of the tokens of its sequence."""
    if PACKED:
        i_n = tl.load(chunk_sequence + i_c)
        start = tl.load(cu_seqlens + i_n) + (i_c - tl.load(chunk_first + i_n)) * C
        return (i_n * 0).to(tl.int64), start, tl.load(cu_seqlens + i_n + 1)
    else:
        return (i_c // NT).to(tl.int64), (i_c % NT) * C, T


@triton.jit
def behind(i_c, cu_seqlens, chunk_sequence, chunk_first, C: tl.constexpr):
    """Return the first token of a chunk i_c that lies after the last packed sequence. It may lie after the row too."""
    i_n = tl.load(chunk_sequence + i_c)
    return tl.load(cu_seqlens + i_n) + (i_c - tl.load(chunk_first + i_n)) * C


@triton.jit
def load_tokens(p, stride_t, o_d, n_tokens, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Load the tile [C, BD] of C tokens and columns o_d of a [T, D] matrix at p. Its first n_tokens tokens exist.

    The tile is 0 for tokens and columns that do not exist. FULL says that every chunk of the launch has C tokens.
    """
    o_t = tl.arange(0, C)
    p_tile = p + o_t[:, None] * stride_t + o_d[None, :]
    if FULL and D % BD == 0:
        return tl.load(p_tile)
    else:
        return tl.load(p_tile, mask=(o_t < n_tokens)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def prefetch_rows(p, stride, D: tl.constexpr, R: tl.constexpr):
    """Ask for R rows of D numbers at p, `stride` apart, to be brought into L2. It is a hint and waits for nothing."""
    if not INTERPRET:
        LINE: tl.constexpr = 1024 // p.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (D + LINE - 1) // LINE
        p_lines = p + tl.arange(0, R)[:, None] * stride + (tl.arange(0, LINES) * LINE)[None, :]
        p_lines = p_lines.to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [p_lines], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def channels(x, eye):
    """Turn a tile [C, BD] of raw inputs into fp32 [BD, C].

    16-bit inputs are multiplied by the identity `eye`. The product is exact, it reads the tile from shared memory as
    the load left it, and its result has the layout that every later product needs.
    """
    if x.dtype == tl.float32:
        return tl.trans(x)
    else:
        return tl.dot(tl.trans(x), eye)


@triton.jit
def padded(x, n_tokens, C: tl.constexpr, FULL: tl.constexpr):
    """Return raw gates x [D, C], with wide open gates after the first n_tokens tokens."""
    if FULL:
        return x
    else:
        return tl.where((tl.arange(0, C) < n_tokens)[None, :], x, OPEN)


@triton.jit
def store_tokens(p, stride_t, o_d, n_tokens, x, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Store the tile x [C, BD] at the place that load_tokens would load it from."""
    o_t = tl.arange(0, C)
    p_tile = p + o_t[:, None] * stride_t + o_d[None, :]
    if FULL and D % BD == 0:
        tl.store(p_tile, x)
    else:
        tl.store(p_tile, x, mask=(o_t < n_tokens)[:, None] & (o_d < D)[None, :])
