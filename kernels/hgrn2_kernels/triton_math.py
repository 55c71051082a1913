"""What every Triton kernel of the chunkwise form shares: gates, decays, and the loads that keep padding harmless.

Logarithms are base 2 inside the kernels, because the hardware's exponential and logarithm are.
"""

import os

import triton
import triton.language as tl

# the interpreter knows no inline assembly; triton decides at decoration, so this is read at import as well
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
# raw gate of a padding row: so open that the state passes unchanged (forget 1, key 0)
OPEN = tl.constexpr(1.0e4)
# largest decay, in powers of two, between the middle of a chunk and its ends that the fast path takes: its operands
# carry the decay and its inverse, and have to stay inside the exponents of bf16 with room for their product
LIMIT = tl.constexpr(80.0)


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
def reciprocal(x):
    if INTERPRET:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def sigmoid_parts(x):
    """(n, m, r) with sigmoid(x) = n r and sigmoid(-x) = m r, all to relative precision for any finite x."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    r = reciprocal(1.0 + e)
    return tl.where(x >= 0, 1.0, e), tl.where(x >= 0, e, 1.0), r


@triton.jit
def gate(x, b):
    """Raw gate x and bound b to (g, k): g = log2(forget) <= 0, finite, and k = 1 - forget."""
    n, m, r = sigmoid_parts(x)
    k = m * r - b * (m * r)
    # the fast logarithm is exact to 2^-22 absolutely, which near forget = 1 is not enough for long memories
    series = -LOG2E * k * (1.0 + k * (0.5 + k * (0.33333333 + 0.25 * k)))
    g = log2(tl.maximum((n + b * m) * r, 1.1754943508222875e-38))
    return tl.where(k < 0.03125, series, g), k


@triton.jit
def silu(x, scale):
    return x * scale * reciprocal(1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def dot(a, b, acc):
    """acc + a b; fp32 operands are multiplied in fp32, not in TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def sum_rows(matrix, x, DT: tl.constexpr):
    """matrix x, for a [C, C] matrix of -1, 0, 1 and fp32 x [C, D], to (nearly) the precision of fp32 on bf16 units."""
    zero = tl.zeros(x.shape, tl.float32)
    if DT == tl.float32:
        return dot(matrix.to(tl.float32), x, zero)
    else:
        hi = x.to(DT)
        mid = (x - hi.to(tl.float32)).to(DT)
        matrix = matrix.to(DT)
        return dot(matrix, mid, dot(matrix, hi, zero))


@triton.jit
def block_decay_matrix(i, j, shift):
    """[C, C] signed: (matrix g)_i = G_i - G_ref, ref the last row of the first half of i's block of 2^shift rows.

    At shift 0 a block is one row and the matrix zero.
    """
    block = (i >> shift) << shift
    ref = block + tl.maximum((1 << shift) >> 1, 1) - 1
    up = (j > ref) & (j <= i)
    down = (j > i) & (j <= ref)
    return tl.where(up, 1.0, tl.where(down, -1.0, 0.0))


@triton.jit
def span(i_c, cu_seqlens, chunk_sequence, chunk_first, T, NT, C: tl.constexpr, PACKED: tl.constexpr):
    """Where chunk i_c lies: (batch row, first token, end of its sequence's tokens); no tokens for an unused chunk."""
    if PACKED:
        n = tl.load(chunk_sequence + i_c)
        start = tl.load(cu_seqlens + n) + (i_c - tl.load(chunk_first + n)) * C
        return (n * 0).to(tl.int64), start, tl.load(cu_seqlens + n + 1)
    else:
        return (i_c // NT).to(tl.int64), (i_c % NT) * C, T


@triton.jit
def load_rows(p, stride_t, o_t, o_d, m_t, D: tl.constexpr, other):
    """Tile [C, BD] of rows o_t and columns o_d of a [T, D] matrix at p; `other` outside."""
    mask = m_t[:, None] & (o_d < D)[None, :]
    return tl.load(p + o_t[:, None].to(tl.int64) * stride_t + o_d[None, :], mask=mask, other=other)


@triton.jit
def store_rows(p, stride_t, o_t, o_d, m_t, D: tl.constexpr, x):
    mask = m_t[:, None] & (o_d < D)[None, :]
    tl.store(p + o_t[:, None].to(tl.int64) * stride_t + o_d[None, :], x, mask=mask)
