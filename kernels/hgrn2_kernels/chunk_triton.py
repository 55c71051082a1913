"""The operator on a GPU: launches of the chunk kernels.

Forward: chunk_state, chunk_output (fast, then exact). Backward: chunk_state again, since only the inputs are kept,
chunk_state in reverse, chunk_output in reverse for dv, chunk_gradient. Nothing waits for the device: which chunks
take the exact path is a flag that chunk_state leaves in memory.
"""

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from hgrn2_kernels.checks import capability
from hgrn2_kernels.chunk_gradient import chunk_gradient_kernel
from hgrn2_kernels.chunk_output import chunk_output_kernel
from hgrn2_kernels.chunk_state import chunk_state_kernel, segment_scan_kernel
from hgrn2_kernels.launch import Arguments, Kernel
from hgrn2_kernels.matrices import matrices

chunk_state, segment_scan = Kernel(chunk_state_kernel), Kernel(segment_scan_kernel)
chunk_output, chunk_gradient = Kernel(chunk_output_kernel), Kernel(chunk_gradient_kernel)

# programs of chunk_state that fill the largest GPU it is tuned for, two on each of 132 multiprocessors
FILL = 256
# what a program of an exact form looks through, most of which it leaves alone
SCAN = 128


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, a pure function of dtype, head dimensions and compute capability.

    Attributes:
        C: tokens a chunk.
        BK: channels of K that share a tile and a flag, the rows of a tensor core's product.
        gradient, exact_gradient: (channels of K, warps) of the two forms of chunk_gradient, which has the most to
            keep in registers.
        BV: channels of V, all of them.
        state_BV: channels of V in chunk_state.
        dtype: of the operands of matrix products and of the states between chunks.
        state_stages, reverse_stages, output_stages: of the pipelines of chunk_state, forward and in reverse, and of
            the fast form of chunk_output.
        warps: of chunk_state and the fast form of chunk_output.
        exact_warps: of the exact form of chunk_output.
    """

    C: int
    BK: int
    gradient: tuple[int, int]
    exact_gradient: tuple[int, int]
    BV: int
    state_BV: int
    dtype: torch.dtype
    state_stages: int
    reverse_stages: int
    output_stages: int
    exact_warps: int = 4
    warps: int = 4

    @classmethod
    def of(cls, dtype: torch.dtype, K: int, V: int, capability: tuple[int, int] = (9, 0)) -> "Config":
        if dtype == torch.float32:
            BK, BV = min(32, max(16, triton.next_power_of_2(K))), max(16, triton.next_power_of_2(V))
            return cls(32, BK, (16, 8), (16, 8), BV, min(BV, 64), torch.float32, 1, 1, 1)
        # Triton 3.6 miscompiles pipelined loads of narrower tiles on Hopper
        BV = max(64, triton.next_power_of_2(V))
        # Hopper and the large Blackwells multiply out of shared memory, the others out of registers
        gradient, exact_warps = ((64, 4), 4) if capability[0] in (9, 10) else ((32, 8), 8)
        # the fast path's operands need the exponents of bf16, which fp16 lacks
        return cls(64, 64, gradient, (32, 8), BV, min(BV, 128), torch.bfloat16, 3, 2, 2, exact_warps)

    def blocks(self, K: int) -> int:
        """Blocks of channels that K has."""
        return -(-K // self.BK)

    @property
    def tl_dtype(self):
        return tl.float32 if self.dtype == torch.float32 else tl.bfloat16


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Which chunk holds which tokens. Packed sequences are tabled on the device, by shapes the host knows.

    Attributes:
        N: sequences.
        NC: chunks, an upper bound where sequences are packed.
        T: tokens of a row.
        per_row: chunks of a row of a dense batch; 0 for packed sequences.
        cu_seqlens, sequence, first: [N + 1], [NC] and [N + 1] int32; None for a dense batch.
    """

    N: int
    NC: int
    T: int
    per_row: int
    cu_seqlens: Tensor | None = None
    sequence: Tensor | None = None
    first: Tensor | None = None

    @staticmethod
    def count(B: int, T: int, N: int | None, C: int) -> int:
        """Chunks of B rows, or of N sequences packed in one."""
        return B * -(-T // C) if N is None else T // C + N

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None, C: int) -> "Chunks":
        B, T = q.shape[:2]
        if cu_seqlens is None:
            return cls(B, cls.count(B, T, None, C), T, triton.cdiv(T, C))
        N = cu_seqlens.numel() - 1
        NC = cls.count(B, T, N, C)
        return cls(N, NC, T, 0, cu_seqlens, *_table(cu_seqlens, C, NC))


@dataclasses.dataclass(frozen=True)
class Segments:
    """How chunk_state cuts sequences so that its programs fill a GPU: 8 chunks a segment at least.

    Attributes:
        count: segments of all sequences, an upper bound where sequences are packed.
        length: chunks a segment.
        per_sequence: segments of a sequence of a dense batch, 1 where sequences are whole; 0 where packed ones are cut.
        sequence, first: [count] and [N + 1] int32, where packed sequences are cut.
    """

    count: int
    length: int
    per_sequence: int = 1
    sequence: Tensor | None = None
    first: Tensor | None = None

    @classmethod
    def of(cls, chunks: Chunks, C: int, programs: int) -> "Segments":
        """Args: chunks of C tokens; programs a segment."""
        wanted = triton.cdiv(FILL, chunks.N * programs)
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
        count = Chunks.count(1, chunks.T, chunks.N, C * length)
        return cls(count, length, 0, *_table(chunks.cu_seqlens, C * length, count))

    @property
    def cut(self) -> bool:
        return self.per_sequence != 1


def _table(cu_seqlens, size, count):
    """For pieces of `size` tokens: the sequence of each piece [count], and the first piece of each sequence [N + 1]."""
    counts = (cu_seqlens.diff() + size - 1) // size
    first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    place = torch.arange(count, dtype=torch.int32, device=cu_seqlens.device)
    sequence = torch.searchsorted(first[1:], place, right=True).clamp_(max=len(counts) - 1).to(torch.int32)
    return sequence, first


def chunk_forward(q, f, v, lower_bound, initial_state, cu_seqlens, scale):
    """Output of the chunk kernels and what a backward may want to keep.

    Args:
        q, f, v, lower_bound, initial_state, cu_seqlens, scale: as in `chunk_hgrn2`, on one device.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32.
        states: [chunks, H, K, V] `Config.dtype`, that entering each chunk, decayed towards the chunk's middle.
        slow: [chunks, H, blocks of K] int8, whether the exact form took the chunk.
    """
    q, f, v = (unit_stride(x) for x in (q, f, v))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens)
        states, final_state = run.states(v, initial_state)
        o = dense_like(v)
        run.output(v, states, o)
    return o, final_state, states, run.slow


def chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, scale, saved=None, into=None):
    """Gradients of q, f, v, lower_bound (None without one) and the initial state.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dfinal_state: [N, H, K, V] fp32, or None.
        q, f, v, lower_bound, initial_state, cu_seqlens, scale: of the forward.
        saved: (states, slow) of the forward, recomputed when None.
        into: tensors that take the gradients of q, f and v, the last dimension contiguous; new ones when None.
    """
    dq, df, dv = (dense_like(x) for x in (q, f, v)) if into is None else into
    q, f, v, do = (unit_stride(x) for x in (q, f, v, do))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens)
        if saved is None:
            states, _ = run.states(v, initial_state)
        else:
            states, run.slow = saved
        dstates, dinitial = run.states(do, dfinal_state, reverse=True)
        run.output(do, dstates, dv, reverse=True)
        dbound = run.gradients(v, do, states, dstates, dq, df)
    return dq, df, dv, dbound, dinitial


def unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def dense_like(x: Tensor) -> Tensor:
    """A new tensor like x [B, T, H, D], dense, with batch inside time where x has it so, as Megatron does."""
    B, T, H, D = x.shape
    return x.new_empty((T, B, H, D)).transpose(0, 1) if x.stride(0) < x.stride(1) else x.new_empty((B, T, H, D))


def _grid(items, exact):
    """One program an item, or enough to look through all items where few are expected to be taken."""
    return (min(items, max(FILL, triton.cdiv(items, SCAN))) if exact else items,)


# of tensors [B, T, H, D], under the names that the kernels give them
_STRIDES = {x: tuple(f"stride_{x}{axis}" for axis in "bth") for x in ("q", "f", "v", "y", "o", "dq", "df")}


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip(_STRIDES[name], x.stride(), strict=False))


class Launches:
    """The launches over one set of inputs."""

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens):
        self.q, self.f, self.bound = q, f, lower_bound
        self.H, self.K, self.V = q.shape[2], q.shape[3], v.shape[3]
        self.config = config = Config.of(q.dtype, self.K, self.V, capability(q.device))
        self.chunks = chunks = Chunks.of(q, cu_seqlens, config.C)
        self.NK = config.blocks(self.K)
        self.state_programs = self.H * self.NK * triton.cdiv(self.V, config.state_BV)
        self.segments = Segments.of(chunks, config.C, self.state_programs)
        # packed sequences may leave chunks over, whose flags nobody writes
        flags = q.new_empty if cu_seqlens is None else q.new_zeros
        self.slow = flags((chunks.NC, self.H, self.NK), dtype=torch.int8)
        sums, ones = matrices(q.device, config.C, config.dtype)
        self.shared = Arguments(
            q=q,
            f=f,
            sums=sums,
            ones=ones,
            # pointers that a kernel does not read still need a tensor
            bound=q if lower_bound is None else lower_bound.contiguous(),
            cu_seqlens=q if cu_seqlens is None else cu_seqlens.contiguous(),
            chunk_sequence=q if cu_seqlens is None else chunks.sequence,
            chunk_first=q if cu_seqlens is None else chunks.first,
            **_strides("q", q),
            **_strides("f", f),
            scale=scale,
            T=chunks.T,
            NT=chunks.per_row,
            NC=chunks.NC,
            H=self.H,
            K=self.K,
            V=self.V,
            C=config.C,
            LEVELS=config.C.bit_length() - 1,
            DT=config.tl_dtype,
            BOUNDED=lower_bound is not None,
            PACKED=cu_seqlens is not None,
            FULL=cu_seqlens is None and q.shape[1] % config.C == 0,
        )

    def states(self, y: Tensor, first: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """States at the chunks' borders [NC, H, K, V], and the one at the end of each sequence [N, H, K, V] fp32."""
        first = None if first is None else first.contiguous()
        states = y.new_empty((self.chunks.NC, self.H, self.K, self.V), dtype=self.config.dtype)
        if not self.segments.cut:
            last = self._per_segment(y, self.V)
            self._walk(y, reverse, first, states=states, last=last)
        else:
            added, decays = self._segment_totals(y, reverse)
            entering, last, _ = self._scan(added, decays, first, reverse)
            self._walk(y, reverse, entering, states=states)
        return states, last

    def totals(self, y: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """State after each sequence from zeros before it [N, H, K, V], and its log2 decay [N, H, K]; fp32."""
        added, decays = self._segment_totals(y, reverse)
        if not self.segments.cut:
            return added, decays
        return self._scan(added, decays, None, reverse)[1:]

    def _per_segment(self, like, *more):
        return like.new_empty((self.segments.count, self.H, self.K, *more), dtype=torch.float32)

    def _segment_totals(self, y, reverse):
        """What each segment adds to a state that passes it, and the log2 decay of that state."""
        added, decays = self._per_segment(y, self.V), self._per_segment(y)
        self._walk(y, reverse, None, last=added, decays=decays)
        return added, decays

    def _scan(self, added, decays, first, reverse):
        """States that enter the segments, in the place of added; of each sequence, state at the end and log2 decay."""
        N = self.chunks.N
        last, total = (x.new_empty((N, *x.shape[1:])) for x in (added, decays))
        segment_scan.launch(
            (N * self.H, triton.cdiv(self.K, 16)),
            4,
            self.shared,
            first=last if first is None else first,
            states=added,
            decays=decays,
            last=last,
            total=total,
            segment_first=self._segment_table("first"),
            SEGMENTS=self.segments.per_sequence,
            BK=16,
            BV=self.config.BV,
            REVERSE=reverse,
            HAS_FIRST=first is not None,
            TABLED=self.segments.first is not None,
        )
        return added, last, total

    def _segment_table(self, name):
        table = getattr(self.segments, name)
        return self.slow if table is None else table

    def _walk(self, y, reverse, first, states=None, last=None, decays=None):
        """One pass of chunk_state over all segments, for what is given to fill."""
        config = self.config
        anything = self.slow
        chunk_state.launch(
            (self.segments.count * self.state_programs,),
            config.warps,
            self.shared,
            y=y,
            first=anything if first is None else first,
            states=anything if states is None else states,
            slow=self.slow,
            last=anything if last is None else last,
            decays=anything if decays is None else decays,
            **_strides("y", y),
            segment_sequence=self._segment_table("sequence"),
            segment_first=self._segment_table("first"),
            SEGMENTS=self.segments.per_sequence,
            LENGTH=self.segments.length,
            TABLED=self.segments.first is not None,
            BK=config.BK,
            BV=config.state_BV,
            REVERSE=reverse,
            STATES=states is not None,
            LAST=last is not None,
            DECAYS=decays is not None,
            HAS_FIRST=first is not None,
            STAGES=config.reverse_stages if reverse else config.state_stages,
        )

    def output(self, y: Tensor, states: Tensor, out: Tensor, reverse: bool = False):
        """Fill out [B, T, H, V]: o from v and the entering states, or dv from do and the gradients of the leaving."""
        config = self.config
        for exact in (False, True):
            chunk_output.launch(
                _grid(self.chunks.NC * self.H, exact),
                config.exact_warps if exact else config.warps,
                self.shared,
                y=y,
                states=states,
                slow=self.slow,
                o=out,
                **_strides("y", y),
                **_strides("o", out),
                BK=config.BK,
                BV=config.BV,
                REVERSE=reverse,
                EXACT=exact,
                SCAN=SCAN,
                STAGES=1 if exact else config.output_stages,
            )

    def gradients(self, v: Tensor, do: Tensor, states: Tensor, dstates: Tensor, dq: Tensor, df: Tensor):
        """Fill dq and df [B, T, H, K]; returns the bound's gradient [H, K], None without a bound."""
        config = self.config
        dbound = None
        if self.bound is not None:
            # packed sequences may leave chunks over, which add nothing
            parts = self.bound.new_zeros if self.shared["PACKED"] else self.bound.new_empty
            dbound = parts((self.chunks.NC, self.H, self.K))
        for exact in (False, True):
            BK, warps = config.exact_gradient if exact else config.gradient
            chunk_gradient.launch(
                _grid(self.chunks.NC * self.H * triton.cdiv(self.K, BK), exact),
                warps,
                self.shared,
                v=v,
                do=do,
                states=states,
                dstates=dstates,
                slow=self.slow,
                dq=dq,
                df=df,
                dbound=self.slow if dbound is None else dbound,
                **_strides("v", v),
                **_strides("o", do),
                **_strides("dq", dq),
                **_strides("df", df),
                BK=BK,
                BF=config.BK,
                BV=config.BV,
                EXACT=exact,
                SCAN=SCAN,
            )
        return None if dbound is None else dbound.sum(0)
