"""The plan of the launches for one shape: tiles, chunks, segments, and all arguments that are not tensors.

The plan follows from the shapes, the dtype and the compute capability, and is computed once for each combination.
"""

import dataclasses
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgrn2_kernels.checks import capability

# the number of programs of chunk_state that fill the largest GPU it is tuned for: two on each of 132 multiprocessors
FILL = 256
# the states that enter the segments are kept for the backward if they take at most this share of the inputs' bytes
ENTERING_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Config:
    """The tiles of the kernels. They follow from the dtype, the head dimensions and the compute capability.

    Attributes:
        C: tokens per chunk.
        BK: channels of K that share a tile and a count of bands: the rows of a tensor core's product.
        gradient: (channels of K, warps) of chunk_gradient, which needs the most registers.
        BV: channels of V, all of them.
        state_BV: channels of V in a program of chunk_state.
        dtype: dtype of the operands of matrix products, and of the states between chunks.
        state_stages, reverse_stages, output_stages: stages of the pipelines of chunk_state forward, of chunk_state in
            reverse, and of chunk_output.
        alone_stages: stages of chunk_state in reverse where each of its programs has a multiprocessor, with all of its
            shared memory, to itself.
        output_warps, state_warps: warps of chunk_output and of chunk_state.
        gradient_ahead: number of programs of chunk_gradient that the GPU runs at a time. Each program prefetches the
            tiles of the program that many places later. 0 means no prefetching, on GPUs where it was not tried.
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
        # two programs on each multiprocessor of an H100
        ahead = 264 if capability == (9, 0) else 0
        state_BV = min(BV, 128)
        # products are in bf16 for fp16 inputs too: the operands of the fast form need exponents that fp16 does not have
        return cls(64, 64, gradient, BV, state_BV, torch.bfloat16, 3, 2, 3, 2, output_warps, gradient_ahead=ahead)

    def blocks(self, K: int) -> int:
        """Return how many blocks of BK channels K has."""
        return -(-K // self.BK)

    @property
    def tl_dtype(self):
        return tl.float32 if self.dtype == torch.float32 else tl.bfloat16


@dataclasses.dataclass(frozen=True)
class Chunks:
    """The number of chunks.

    Attributes:
        N: sequences.
        NC: chunks; an upper bound where sequences are packed.
        T: tokens per row.
        per_row: chunks per row of a dense batch; 0 for packed sequences.
    """

    N: int
    NC: int
    T: int
    per_row: int

    @classmethod
    def of(cls, B: int, T: int, N: int | None, C: int) -> "Chunks":
        """Count the chunks of C tokens in B rows, or in N sequences packed in one row."""
        if N is None:
            return cls(B, B * -(-T // C), T, -(-T // C))
        # The tokens after the last sequence are cut into chunks like one more sequence. A sequence leaves at most C - 1
        # places of its last chunk empty.
        return cls(N, N + 1 + (T - N - 1) // C, T, 0)


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments into which chunk_state cuts sequences, so that its programs fill a GPU.

    A segment is the stretch of chunks that one walk of a kernel covers. If sequences are cut, it has 8 chunks or more.

    Attributes:
        count: segments of all sequences; an upper bound where sequences are packed.
        length: chunks per segment.
        per_sequence: segments per sequence. It is 1 where sequences are whole, and 0 where packed sequences are cut.
    """

    count: int
    length: int
    per_sequence: int = 1

    @classmethod
    def of(cls, chunks: Chunks, C: int, wanted: int, least: int) -> "Segments":
        """Cut each sequence of chunks of C tokens into `wanted` segments, or not at all if these are below `least`."""
        if chunks.per_row:
            wanted = min(wanted, chunks.per_row // 8)
        if wanted < least:
            return cls(chunks.N, chunks.NC)
        if chunks.per_row:
            length = triton.cdiv(chunks.per_row, wanted)
            per_sequence = triton.cdiv(chunks.per_row, length)
            return cls(chunks.N * per_sequence, length, per_sequence)
        length = max(8, triton.cdiv(chunks.NC, chunks.N * wanted))
        return cls(Chunks.of(1, chunks.T, chunks.N, C * length).NC, length, 0)

    @functools.cached_property
    def cut(self) -> bool:
        """Return whether sequences may consist of several segments."""
        return self.per_sequence != 1

    @functools.cached_property
    def tabled(self) -> bool:
        """Return whether a table says which sequence a segment belongs to."""
        return self.per_sequence == 0


def keeps_entering(segments: Segments, tokens: int, K: int, V: int, itemsize: int) -> bool:
    """Return whether the states that enter the segments are small enough to be kept for the backward."""
    return segments.cut and segments.count * K * V * 4 <= ENTERING_SHARE * tokens * (2 * K + V) * itemsize


def table(cu_seqlens: Tensor, size: int, count: int) -> tuple[Tensor, Tensor]:
    """Cut packed sequences into parts of `size` tokens, and return the sequence that each part belongs to.

    Returns:
        sequence: [count] int32, the sequence of each part. Parts beyond the last sequence belong to number N.
        first: [N + 1] int32, the first part of each sequence, and of number N.

    Both tensors are on the device of cu_seqlens.
    """
    counts = (cu_seqlens.diff() + size - 1) // size
    first = cu_seqlens.new_zeros(len(cu_seqlens), dtype=torch.int32)
    ends = torch.cumsum(counts, 0, dtype=torch.int32, out=first[1:])
    place = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, place, right=True, out_int32=True)
    return sequence, first


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything that the launches for one shape have in common.

    Attributes:
        config, chunks, segments: the tiles, the chunks and the segments.
        blocks: blocks of channels of K that share a count of bands.
        state_programs: programs of chunk_state per segment.
        output_programs, gradient_programs: programs of chunk_output and chunk_gradient, in all.
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
    keeps_entering: bool
    H: int
    K: int
    V: int
    bounded: bool
    packed: bool
    numbers: dict

    @classmethod
    def of(cls, q: Tensor, f: Tensor, v: Tensor, bounded: bool, scale: float, N: int | None) -> "Plan":
        """Return the plan for these inputs. N is the number of packed sequences, or None for a dense batch."""
        return _plan(q.device, q.dtype, q.shape, v.shape[3], q.stride(), f.stride(), bounded, scale, N, FILL)


@functools.lru_cache(maxsize=1024)
def _plan(device, dtype, shape, V, stride_q, stride_f, bounded, scale, N, fill):
    B, T, H, K = shape
    config = Config.of(dtype, K, V, capability(device))
    chunks = Chunks.of(B, T, N, config.C)
    blocks = config.blocks(K)
    state_programs = H * blocks * triton.cdiv(V, config.state_BV)
    # the additional pass over the segments costs as much as two segments gain
    segments = Segments.of(chunks, config.C, triton.cdiv(fill, chunks.N * state_programs), least=3)
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
        keeps_entering=keeps_entering(segments, B * T, K, V, dtype.itemsize),
        H=H,
        K=K,
        V=V,
        bounded=bounded,
        packed=N is not None,
        numbers=numbers,
    )


def strides(name: str, stride: tuple[int, ...]) -> dict[str, int]:
    """Return the stride arguments of a kernel for the tensor [B, T, H, D] with that name, whose last stride is 1."""
    b, t, h = _STRIDES[name]
    return {b: stride[0], t: stride[1], h: stride[2]}


_STRIDES = {x: tuple(f"stride_{x}{axis}" for axis in "bth") for x in ("q", "f", "v", "y", "o", "do", "dq", "df")}
