"""The functions that the kernels for Hopper share: gates, the place of a segment, and copies of tiles by TMA.

These kernels are written in Gluon, because in plain Triton all warps of a program have the same role. Gluon has no
interpreter, so they run on a GPU only. Formulas, roundings and names of variables follow triton_math.py. In addition,
a name that ends in _s is a tile in shared memory, and one that ends in _full or _empty is a barrier.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hgrn2_kernels import triton_math

LOG2E = gl.constexpr(triton_math.LOG2E.value)
LIMIT = gl.constexpr(triton_math.LIMIT.value)
BANDS = gl.constexpr(triton_math.BANDS.value)
UNIT = gl.constexpr(triton_math.UNIT.value)
# the index at which a sequence ends in the descriptor of packed sequences, see hopper_tiles.py
BORDER = gl.constexpr(2**30)
# the barrier of all threads in a group of warps, which Triton renamed between 3.6 and 3.7.1
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# functions that Triton 3.9 has under these names alone: copies of a tile by TMA, and a tile seen with another layout
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
async_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_memory = gl.shared_memory_descriptor
reinterpret = _memory.reinterpret if hasattr(_memory, "reinterpret") else _memory._reinterpret


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
def gate(x, b_bound):
    """Turn raw gates x and lower bounds into (g, k), as triton_math.gate does for 16-bit operands."""
    e = exp2(gl.maximum(x * LOG2E, -125.0))
    r = reciprocal(1.0 + e)
    k = (1.0 - b_bound) * r
    series = k * (-LOG2E - k * (0.5 * LOG2E))
    return gl.where(k < 0.0078125, series, log2((b_bound + e) * r)), k


@gluon.jit
def silu(x, inverse_scale):
    """Return silu(x) / inverse_scale."""
    return x * reciprocal(inverse_scale + inverse_scale * exp2(-x * LOG2E))


@gluon.jit
def load_bound(bound, o_hk, BOUNDED: gl.constexpr, layout: gl.constexpr):
    """Load the lower bounds at o_hk, or return zeros without a bound."""
    if BOUNDED:
        return gl.load(bound + o_hk)
    else:
        return gl.zeros([o_hk.shape[0]], gl.float32, layout)


@gluon.jit
def load_initial(initial, rows, i_s, i_h, o_kv, H: gl.constexpr, SIZE: gl.constexpr, ROWS: gl.constexpr):
    """Load the state of segment i_s and head i_h: row i_s of initial, or row rows[i_s], or zeros where that is -1."""
    if ROWS:
        i_row = gl.load(rows + i_s).to(gl.int64)
        m_row = (o_kv >= 0) & (i_row >= 0)
        return gl.load(initial + (i_row * H + i_h) * SIZE + o_kv, mask=m_row, other=0.0)
    else:
        return gl.load(initial + (i_s.to(gl.int64) * H + i_h) * SIZE + o_kv)


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
    """Return where segment i_s lies: batch row, first token, end of its sequence's tokens, first chunk, n_chunks.

    The arguments are the same as in chunk_state_kernel. With packed sequences, a segment that belongs to no sequence
    has 0 chunks.
    """
    if TABLED:
        i_n = gl.load(segment_sequence + i_s)
        n_before = (i_s - gl.load(segment_first + i_n)) * LENGTH
    else:
        i_n = i_s // SEGMENTS
        n_before = (i_s % SEGMENTS) * LENGTH
    if PACKED:
        i_b = i_n * 0
        start = gl.load(cu_seqlens + i_n)
        end = gl.load(cu_seqlens + i_n + 1)
        i_first = gl.load(chunk_first + i_n)
        n_chunks = (end - start + C - 1) // C
    else:
        i_b = i_n
        start = i_n * 0
        end = T
        i_first = i_n * NT
        n_chunks = NT
    n_chunks = gl.maximum(gl.minimum(n_chunks - n_before, LENGTH), 0)
    return i_b, start + n_before * C, end, i_first + n_before, n_chunks


@gluon.jit
def fetch(x, i_b, t, end, i_h, x_s, full, BYTES: gl.constexpr, PACKED: gl.constexpr, pred=True):
    """Fetch the tile of head i_h from token t on into x_s, with zeros from token `end` on.

    The first fetch on a barrier passes in BYTES the number of bytes that all fetches on it bring. The others pass 0.
    """
    if BYTES > 0:
        mbarrier.expect(full, BYTES, pred=pred)
    if PACKED:
        async_load(x, [BORDER, end, BORDER - end + t, i_h, 0], full, x_s, pred=pred)
    else:
        async_load(x, [i_b, t, i_h, 0], full, x_s, pred=pred)


@gluon.jit
def store(x, i_b, t, end, i_h, x_s, PACKED: gl.constexpr):
    """Store the tile x_s of head i_h from token t on, and nothing from token `end` on."""
    if PACKED:
        async_store(x, [BORDER, end, BORDER - end + t, i_h, 0], x_s)
    else:
        async_store(x, [i_b, t, i_h, 0], x_s)
