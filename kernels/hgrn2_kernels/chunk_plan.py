"""What the launches over one shape need to know: tiles, chunks, segments, and every argument that is not a tensor.

All of it is a pure function of shapes, dtype and compute capability, found once for each.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgrn2_kernels.checks import capability

# programs of chunk_state that fill the largest GPU it is tuned for, two on each of 132 multiprocessors
FILL = 256
# bytes that the backward may ask to keep beyond the inputs, as a share of theirs
KEPT = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, a pure function of dtype, head dimensions and compute capability.

    Attributes:
        C: tokens a chunk.
        BK: channels of K that share a tile and a flag, the rows of a tensor core's product.
        gradient: (channels of K, warps) of chunk_gradient, which has the most to keep in registers.
        BV: channels of V, all of them.
        state_BV: channels of V in chunk_state.
        dtype: of the operands of matrix products and of the states between chunks.
        state_stages, reverse_stages, output_stages: of the pipelines of chunk_state, forward and in reverse, and of
            chunk_output.
        alone_stages: of chunk_state in reverse where its programs have a multiprocessor each, and its shared memory.
        output_warps, state_warps: of chunk_output and chunk_state.
        gradient_ahead: programs of chunk_gradient that a GPU runs at a time, whose successors' tiles they prefetch; 0
            where that was not tried.
    """

    C: int
    BK: int
    gradient: tuple[int, int]
    BV: int
    state_BV: int
    dtype: torch.dtype
    state_stages: int
    reverse_stages: int
    alone_stages: int
    output_stages: int
    output_warps: int = 4
    state_warps: int = 4
    gradient_ahead: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype, K: int, V: int, capability: tuple[int, int] = (9, 0)) -> "Config":
        if dtype == torch.float32:
            BK, BV = min(32, max(16, triton.next_power_of_2(K))), max(16, triton.next_power_of_2(V))
            return cls(32, BK, (16, 8), BV, min(BV, 64), torch.float32, 1, 1, 1, 1)
        # Triton 3.6 miscompiles pipelined loads of narrower tiles on Hopper
        BV = max(64, triton.next_power_of_2(V))
        # Hopper and the large Blackwells multiply out of shared memory, the others out of registers
        wide = capability[0] in (9, 10)
        gradient, output_warps = (64, 4) if wide else (32, 8), 4 if wide and BV <= 128 else 8
        # the fast path's operands need the exponents of bf16, which fp16 lacks
        # two on each multiprocessor of an H100
        ahead = 264 if capability == (9, 0) else 0
        state_BV = min(BV, 128)
        return cls(64, 64, gradient, BV, state_BV, torch.bfloat16, 3, 2, 3, 2, output_warps, gradient_ahead=ahead)

    def blocks(self, K: int) -> int:
        """Blocks of channels that K has."""
        return -(-K // self.BK)

    @property
    def tl_dtype(self):
        return tl.float32 if self.dtype == torch.float32 else tl.bfloat16


@dataclasses.dataclass(frozen=True)
class Chunks:
    """How many chunks there are.

    Attributes:
        N: sequences.
        NC: chunks, an upper bound where sequences are packed.
        T: tokens of a row.
        per_row: chunks of a row of a dense batch; 0 for packed sequences.
    """

    N: int
    NC: int
    T: int
    per_row: int

    @classmethod
    def of(cls, B: int, T: int, N: int | None, C: int) -> "Chunks":
        """Chunks of C tokens of B rows, or of N sequences packed in one."""
        if N is None:
            return cls(B, B * -(-T // C), T, -(-T // C))
        # what lies behind the last sequence takes chunks like one more; a part is cut short by C - 1 tokens at most
        return cls(N, N + 1 + (T - N - 1) // C, T, 0)


@dataclasses.dataclass(frozen=True)
class Segments:
    """How chunk_state cuts sequences so that its programs fill a GPU: 8 chunks a segment at least.

    Attributes:
        count: segments of all sequences, an upper bound where sequences are packed.
        length: chunks a segment.
        per_sequence: segments of a sequence of a dense batch, 1 where sequences are whole; 0 where packed ones are cut.
    """

    count: int
    length: int
    per_sequence: int = 1

    @classmethod
    def of(cls, chunks: Chunks, C: int, programs: int, fill: int) -> "Segments":
        """Args: chunks of C tokens; programs a segment, and those that fill a GPU."""
        wanted = triton.cdiv(fill, chunks.N * programs)
        if chunks.per_row:
            wanted = min(wanted, chunks.per_row // 8)
        # the pass over the segments that comes first costs as much as two segments gain
        if wanted < 3:
            return cls(chunks.N, chunks.NC)
        if chunks.per_row:
            length = triton.cdiv(chunks.per_row, wanted)
            per_sequence = triton.cdiv(chunks.per_row, length)
            return cls(chunks.N * per_sequence, length, per_sequence)
        length = max(8, triton.cdiv(chunks.NC, chunks.N * wanted))
        return cls(Chunks.of(1, chunks.T, chunks.N, C * length).NC, length, 0)

    @property
    def cut(self) -> bool:
        return self.per_sequence != 1

    @property
    def tabled(self) -> bool:
        return self.per_sequence == 0


def table(cu_seqlens: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """For pieces of `size` tokens: the sequence of each piece [count], and the first piece of each sequence [N + 1].

    int32, made on the device; pieces beyond the last sequence's belong to number N, and start where it would.
    """
    counts = (cu_seqlens.diff() + size - 1) // size
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    place = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], place, right=True, out_int32=True)
    return sequence, first


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Attributes:
    config, chunks, segments: of the shape.
    blocks: of channels that share a flag.
    state_programs, output_programs, gradient_programs: of chunk_state a segment, and of the other two in all.
    state_stages, reverse_stages: of the pipelines of chunk_state, forward and in reverse.
    keeps_entering: whether the states that enter the segments are small enough to be kept for the backward.
    H, K, V: heads and their dimensions.
    bounded, packed: whether there is a bound, and whether sequences are packed.
    numbers: arguments of all kernels.
    """

    config: Config
    chunks: Chunks
    segments: Segments
    blocks: int
    state_programs: int
    output_programs: int
    gradient_programs: int
    state_stages: int
    reverse_stages: int
    keeps_entering: bool
    H: int
    K: int
    V: int
    bounded: bool
    packed: bool
    numbers: dict

    @classmethod
    def of(cls, q: Tensor, f: Tensor, v: Tensor, bounded: bool, scale: float, N: int | None) -> "Plan":
        """Args: the inputs; whether there is a bound; N packed sequences, or None."""
        return _plan(q.device, q.dtype, q.shape, v.shape[3], q.stride(), f.stride(), bounded, scale, N, FILL)


@functools.lru_cache(maxsize=1024)
def _plan(device, dtype, shape, V, stride_q, stride_f, bounded, scale, N, fill):
    B, T, H, K = shape
    config = Config.of(dtype, K, V, capability(device))
    chunks = Chunks.of(B, T, N, config.C)
    blocks = config.blocks(K)
    state_programs = H * blocks * triton.cdiv(V, config.state_BV)
    segments = Segments.of(chunks, config.C, state_programs, fill)
    alone = segments.count * state_programs <= fill // 2
    numbers = dict(
        **strides("q", stride_q),
        **strides("f", stride_f),
        inverse_scale=1 / scale,
        T=T,
        NT=chunks.per_row,
        NC=chunks.NC,
        H=H,
        K=K,
        V=V,
        C=config.C,
        LEVELS=config.C.bit_length() - 1,
        DT=config.tl_dtype,
        BOUNDED=bounded,
        PACKED=N is not None,
        FULL=N is None and T % config.C == 0,
    )
    return Plan(
        config=config,
        chunks=chunks,
        segments=segments,
        blocks=blocks,
        state_programs=state_programs,
        output_programs=chunks.NC * H,
        gradient_programs=chunks.NC * H * triton.cdiv(K, config.gradient[0]),
        state_stages=config.state_stages,
        reverse_stages=config.alone_stages if alone else config.reverse_stages,
        keeps_entering=segments.cut and segments.count * K * V * 4 <= KEPT * B * T * (2 * K + V) * dtype.itemsize,
        H=H,
        K=K,
        V=V,
        bounded=bounded,
        packed=N is not None,
        numbers=numbers,
    )


def strides(name: str, stride: tuple[int, ...]) -> dict[str, int]:
    """The arguments of a kernel for a tensor [B, T, H, D] of that name whose last stride is 1."""
    b, t, h = _STRIDES[name]
    return {b: stride[0], t: stride[1], h: stride[2]}


_STRIDES = {x: tuple(f"stride_{x}{axis}" for axis in "bth") for x in ("q", "f", "v", "y", "o", "dq", "df")}
