"""Pieces that the kernels for Hopper share: gates, where a segment lies, and the copies of tiles by TMA.

These kernels are in Gluon, because plain Triton gives no two roles to the warps of a program. Gluon has no interpreter:
they run on a GPU only. Formulas, roundings and names are those of triton_math.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hgrn2_kernels import triton_math

LOG2E = gl.constexpr(triton_math.LOG2E.value)
LIMIT = gl.constexpr(triton_math.LIMIT.value)
BANDS = gl.constexpr(triton_math.BANDS.value)
UNIT = gl.constexpr(triton_math.UNIT.value)
# the end of a sequence lies here in the descriptor of packed sequences, see `descriptor` in hopper.py
BORDER = gl.constexpr(2**30)


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def gate(x, b):
    """Raw gate x and bound b to (g, k), as triton_math.gate for 16-bit operands."""
    e = exp2(gl.maximum(x * LOG2E, -125.0))
    r = reciprocal(1.0 + e)
    k = (1.0 - b) * r
    series = k * (-LOG2E - k * (0.5 * LOG2E))
    return gl.where(k < 0.0078125, series, log2((b + e) * r)), k


@gluon.jit
def silu(x, inverse_scale):
    """silu(x) / inverse_scale."""
    return x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))


@gluon.jit
def bound_of(bound, at, BOUNDED: gl.constexpr, layout: gl.constexpr):
    """Lower bounds at `at`, zeros where there are none."""
    if BOUNDED:
        return gl.load(bound + at)
    else:
        return gl.zeros([at.shape[0]], gl.float32, layout)


@gluon.jit
def segment_of(
    i_s,
    cu_seqlens,
    chunk_first,
    segment_sequence,
    segment_first,
    T,
    NT,
    SEGMENTS,
    LENGTH,
    C: gl.constexpr,
    PACKED: gl.constexpr,
    TABLED: gl.constexpr,
):
    """Where segment i_s lies: (row of the batch, first token, end of its sequence's tokens, first chunk, chunks).

    Arguments as those of chunk_state_kernel. A segment that packed sequences leave over has no chunks.
    """
    if TABLED:
        i_n = gl.load(segment_sequence + i_s)
        skipped = (i_s - gl.load(segment_first + i_n)) * LENGTH
    else:
        i_n = i_s // SEGMENTS
        skipped = (i_s % SEGMENTS) * LENGTH
    if PACKED:
        row = i_n * 0
        start = gl.load(cu_seqlens + i_n)
        end = gl.load(cu_seqlens + i_n + 1)
        chunk = gl.load(chunk_first + i_n)
        steps = (end - start + C - 1) // C
    else:
        row = i_n
        start = i_n * 0
        end = T
        chunk = i_n * NT
        steps = NT
    steps = gl.maximum(gl.minimum(steps - skipped, LENGTH), 0)
    return row, start + skipped * C, end, chunk + skipped, steps


@gluon.jit
def fetch(x, row, t, end, i_h, x_s, full, BYTES: gl.constexpr, PACKED: gl.constexpr, pred=True):
    """Fetch the tile of head i_h from token t on, zeros from token `end` on.

    BYTES is what this fetch and those after it on the same barrier bring, 0 for those after it.
    """
    if BYTES > 0:
        mbarrier.expect(full, BYTES, pred=pred)
    if PACKED:
        tma.async_copy_global_to_shared(x, [BORDER, end, BORDER - end + t, i_h, 0], full, x_s, pred=pred)
    else:
        tma.async_copy_global_to_shared(x, [row, t, i_h, 0], full, x_s, pred=pred)


@gluon.jit
def store(x, row, t, end, i_h, x_s, PACKED: gl.constexpr):
    """Store the tile of head i_h from token t on, and nothing from token `end` on."""
    if PACKED:
        tma.async_copy_shared_to_global(x, [BORDER, end, BORDER - end + t, i_h, 0], x_s)
    else:
        tma.async_copy_shared_to_global(x, [row, t, i_h, 0], x_s)
