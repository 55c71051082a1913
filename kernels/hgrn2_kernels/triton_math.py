"""What every Triton kernel of the chunkwise form shares: gates, decays, and the loads that keep padding harmless.

Logarithms are base 2 inside the kernels, because the hardware's exponential and logarithm are. Tiles hold channels
in rows and tokens in columns: sums over the tokens of a chunk are then products whose left operand stays in the
registers that the gates were computed in, and per-channel factors scale rows of the state.
"""

import os

import triton
import triton.language as tl

# the interpreter knows no inline assembly; triton decides at decoration, so this is read at import as well
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# raw gate of a padding token: so open that the state passes unchanged (forget 1, key 0)
OPEN = tl.constexpr(1.0e4)
# largest decay, in powers of two, between the middle of a chunk, or of a band of it, and its ends: operands carry the
# decay and its inverse, and have to stay inside the exponents of bf16 with room for their product
LIMIT = tl.constexpr(96.0)
# the same for fp32, where the roundings of larger decays would show
LIMIT_FP32 = tl.constexpr(20.0)
LARGEST, LARGEST_FP32 = tl.constexpr(2.0**LIMIT.value), tl.constexpr(2.0**LIMIT_FP32.value)
# the most bands that a chunk is cut into: with more, what each token reads of its own write would drown what closed
# gates leave of the others', and the exact form is hardly slower. In fp32 it would do so from the second band on
BANDS = tl.constexpr(4)
BANDS_FP32 = tl.constexpr(1)
# the forms of a chunk: one product, a product a band, or exact
FAST, BANDED, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# log gates lie in [-125, 0]: in fp16, this many to a power of two, they keep 11 bits down to 2^-23
UNIT = tl.constexpr(512.0)


@triton.jit
def log2(x):
    """Base-2 logarithm; tl.log2 calls a library routine several times slower."""
    if INTERPRET:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def exp2(x):
    """Base-2 exponential, 0 below 2^-126; tl.exp2 spends three more instructions on what lies there."""
    if INTERPRET:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid_parts(x):
    """(e, r) with sigmoid(x) = e r and sigmoid(-x) = r, both to relative precision and finite for any finite x."""
    e = exp2(tl.minimum(tl.maximum(x * LOG2E, -125.0), 125.0))
    return e, reciprocal(1.0 + e)


@triton.jit
def gate(x, b, DT: tl.constexpr):
    """Raw gate x and bound b to (g, k): g = log2(forget) in [-125, 0], and k = 1 - forget; DT as that of sum_gates.

    The fast logarithm is exact to 2^-22 absolutely, which near forget = 1 is not enough for long memories: there a
    series of log(1 - k) replaces it, relatively exact to 2^-15 where the sums keep 11 bits, and to 2^-22 in fp32.
    """
    e = exp2(tl.maximum(x * LOG2E, -125.0))
    r = reciprocal(1.0 + e)
    k = (1.0 - b) * r
    if DT == tl.float32:
        near = 0.03125
        series = k * (-LOG2E - k * (0.5 * LOG2E + k * (0.33333333 * LOG2E + k * (0.25 * LOG2E))))
    else:
        near = 0.0078125
        series = k * (-LOG2E - k * (0.5 * LOG2E))
    # a gate so open that e is infinite has k = 0
    return tl.where(k < near, series, log2((b + e) * r)), k


@triton.jit
def silu(x, inverse_scale):
    """silu(x) / inverse_scale."""
    return x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))


@triton.jit
def dot(a, b, acc):
    """acc + a b; fp32 operands are multiplied in fp32, not in TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_matrix(matrices, n, C: tl.constexpr):
    """Matrix n of a stack [_, C, C], see matrices.py."""
    o_c = tl.arange(0, C)
    return tl.load(matrices + n * C * C + o_c[:, None] * C + o_c[None, :])


@triton.jit
def sum_gates(g, matrix, EXACT: tl.constexpr):
    """g matrix, for log gates g [D, C] and a matrix [C, N] of 0 and plus or minus one unit: the decay between tokens.

    For 16-bit operands a unit is 1 / UNIT in fp16, and g is rounded to 11 bits, or to 22 where EXACT. Eleven are more
    than the raw gate had in bf16, but of a decay of 2^-40, all that is left where every gate is closed, they would
    leave an error of a percent.
    """
    zero = tl.zeros([g.shape[0], matrix.shape[1]], tl.float32)
    if matrix.dtype == tl.float32:
        return dot(g, matrix, zero)
    else:
        units = g * UNIT
        hi = units.to(tl.float16)
        if EXACT:
            zero = dot((units - hi.to(tl.float32)).to(tl.float16), matrix, zero)
        return dot(hi, matrix, zero)


@triton.jit
def sum_all_gates(g, ones, C: tl.constexpr):
    """Decay of a chunk of log gates g [D, C], of the digits that sum_gates takes: [D, 1], or each column of [D, C]."""
    if ones.dtype.element_ty == tl.float32:
        # a reduction would hand its result on through shared memory, written more than once
        return sum_tokens(g, load_matrix(ones, 4, C))
    else:
        return tl.sum((g * UNIT).to(tl.float16).to(tl.float32), 1)[:, None] * (1.0 / UNIT)


@triton.jit
def upper_half(bits):
    """fp32 from the upper 16 bits of an int32: a number that bf16 holds.

    A conversion to bf16 and back is three instructions, the first at an eighth of the rate of others.
    """
    return (bits & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, DT: tl.constexpr):
    """fp32 x to the nearest number of DT, in fp32; a tie away from 0."""
    if DT == tl.float32:
        return x
    else:
        return upper_half(x.to(tl.int32, bitcast=True) + 32768)


@triton.jit
def sum_tokens(x, matrix):
    """x matrix, for fp32 x [D, C] and a matrix [C, N] of 0 and 1, to (nearly) the precision of fp32."""
    zero = tl.zeros([x.shape[0], matrix.shape[1]], tl.float32)
    if matrix.dtype == tl.float32:
        return dot(x, matrix, zero)
    else:
        hi = upper_half(x.to(tl.int32, bitcast=True))
        return dot((x - hi).to(matrix.dtype), matrix, dot(hi.to(matrix.dtype), matrix, zero))


@triton.jit
def limit(DT: tl.constexpr):
    return LIMIT_FP32 if DT == tl.float32 else LIMIT


@triton.jit
def whole_matrix(C: tl.constexpr, DT: tl.constexpr):
    """[C, 16]: each column of (g matrix) is the decay of a chunk."""
    if DT == tl.float32:
        return tl.full([C, 16], 1.0, tl.float32)
    else:
        return tl.full([C, 16], 1.0 / UNIT, tl.float16)


@triton.jit
def bands_of(whole, DT: tl.constexpr):
    """How many bands a chunk needs whose channels decay by `whole` [D]: 1 within the limit, BANDS + 1 for too many."""
    # bands are told apart by whole powers of two, and sums of the other kernels may differ in the last digit
    needed = ((tl.max(-whole, 0) + 1.5) * (0.5 / limit(DT))).to(tl.int32) + 1
    return tl.where(needed <= (BANDS_FP32 if DT == tl.float32 else BANDS), needed, BANDS + 1)


@triton.jit
def form_of(n):
    """The form that a chunk of n bands takes; none where n is 0, for a chunk behind packed sequences."""
    return tl.where(n == 0, -1, tl.where(n == 1, FAST, tl.where(n <= BANDS, BANDED, EXACT)))


@triton.jit
def in_band(e, DT: tl.constexpr):
    """Of exponents e in a band's frame, those of its own tokens: every token is in one band."""
    return (e <= limit(DT)) & (e > -limit(DT))


@triton.jit
def column(x, n: tl.constexpr):
    """Column n of a tile [D, C]."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == n)[None, :], x, 0.0), 1)


@triton.jit
def frame(whole, DT: tl.constexpr):
    """Decay of a stored state towards the middle of a chunk that decays by `whole`, as far as the limit."""
    return tl.maximum(0.5 * whole, -limit(DT))


@triton.jit
def span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Where chunk i_c lies: (batch row, first token, end of its sequence's tokens)."""
    if PACKED:
        n = tl.load(chunk_sequence + i_c)
        start = tl.load(cu_seqlens + n) + (i_c - tl.load(chunk_first + n)) * C
        return (n * 0).to(tl.int64), start, tl.load(cu_seqlens + n + 1)
    else:
        return (i_c // NT).to(tl.int64), (i_c % NT) * C, T


@triton.jit
def behind(i_c, cu_seqlens, chunk_sequence, chunk_first, C: tl.constexpr):
    """First token of chunk i_c, where that is one behind the last of the packed sequences, perhaps behind the row."""
    n = tl.load(chunk_sequence + i_c)
    return tl.load(cu_seqlens + n) + (i_c - tl.load(chunk_first + n)) * C


@triton.jit
def load_tokens(p, stride_t, o_d, left, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    """Tile [C, BD] of the next C tokens and columns o_d of a [T, D] matrix at p, of which `left` tokens are there.

    Zeros outside; FULL says that no chunk is cut short.
    """
    o_c = tl.arange(0, C)
    at = p + o_c[:, None] * stride_t + o_d[None, :]
    if FULL and D % BD == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(o_c < left)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def prefetch_rows(p, stride, D: tl.constexpr, R: tl.constexpr):
    """Bring R rows of D numbers at p, stride apart, into L2: a hint, which waits for nothing."""
    if not INTERPRET:
        LINE: tl.constexpr = 1024 // p.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (D + LINE - 1) // LINE
        at = p + tl.arange(0, R)[:, None] * stride + (tl.arange(0, LINES) * LINE)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def channels(x, eye):
    """A tile [C, BD] of raw inputs to fp32 [BD, C].

    16-bit inputs by a product with the identity, which is exact and gives the layout of every later product: it takes
    the tile from shared memory as the load left it.
    """
    if x.dtype == tl.float32:
        return tl.trans(x)
    else:
        return tl.dot(tl.trans(x), eye)


@triton.jit
def padded(x, left, C: tl.constexpr, FULL: tl.constexpr):
    """Raw gates [D, C] with those of tokens that are not there wide open."""
    if FULL:
        return x
    else:
        return tl.where((tl.arange(0, C) < left)[None, :], x, OPEN)


@triton.jit
def store_tokens(p, stride_t, o_d, left, x, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, FULL: tl.constexpr):
    o_c = tl.arange(0, C)
    at = p + o_c[:, None] * stride_t + o_d[None, :]
    if FULL and D % BD == 0:
        tl.store(at, x)
    else:
        tl.store(at, x, mask=(o_c < left)[:, None] & (o_d < D)[None, :])
