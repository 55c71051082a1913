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

from hgrn2_kernels.chunk_gradient import chunk_gradient_kernel
from hgrn2_kernels.chunk_output import chunk_output_kernel
from hgrn2_kernels.chunk_state import chunk_state_kernel, segment_scan_kernel

# programs of chunk_state that fill the largest GPU it is tuned for, two on each of 132 multiprocessors
FILL = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """Tiles of the kernels, a pure function of dtype and head dimensions.

    Attributes:
        C: tokens a chunk.
        BK: channels of K that share a tile, and a flag; the rows of a tensor core's product where it has them.
        BV: channels of V, all of them.
        state_BV: channels of V in chunk_state.
        dtype: of the operands of matrix products and of the states between chunks.
        stages: of chunk_state's pipeline.
        warps: of every kernel.
        group: chunks a program of the exact forms looks at, most of which it will leave alone.
    """

    C: int
    BK: int
    BV: int
    state_BV: int
    dtype: torch.dtype
    stages: int
    warps: int = 4
    group: int = 8
    output_stages: int = 1
    output_group: int = 1
    gradient_group: int = 1

    @classmethod
    def of(cls, dtype: torch.dtype, K: int, V: int) -> "Config":
        wide = dtype == torch.float32
        BK = min(32, max(16, triton.next_power_of_2(K))) if wide else 64
        BV = max(16, triton.next_power_of_2(V))
        return cls(
            C=32 if wide else 64,
            BK=BK,
            BV=BV,
            state_BV=min(BV, 64 if wide else 128),
            # the fast path's operands need the exponents of bf16, which fp16 lacks
            dtype=torch.float32 if wide else torch.bfloat16,
            stages=1 if wide else 2,
        )

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
        counts = (cu_seqlens.diff() + C - 1) // C
        first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        place = torch.arange(NC, dtype=torch.int32, device=q.device)
        sequence = torch.searchsorted(first[1:], place, right=True).clamp_(max=N - 1).to(torch.int32)
        return cls(N, NC, T, 0, cu_seqlens, sequence, first)


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
    q, f, v = (_unit_stride(x) for x in (q, f, v))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens)
        states, final_state = run.states(v, initial_state)
        return run.output(v, states), final_state, states, run.slow


def chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, scale, saved=None):
    """Gradients of q, f, v, lower_bound (None without one) and the initial state.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dfinal_state: [N, H, K, V] fp32, or None.
        q, f, v, lower_bound, initial_state, cu_seqlens, scale: of the forward.
        saved: (states, slow) of the forward, recomputed when None.
    """
    q, f, v, do = (_unit_stride(x) for x in (q, f, v, do))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens)
        if saved is None:
            states, _ = run.states(v, initial_state)
        else:
            states, run.slow = saved
        dstates, dinitial = run.states(do, dfinal_state, reverse=True)
        dv = run.output(do, dstates, reverse=True)
        dq, df, dbound = run.gradients(v, do, states, dstates)
    return dq, df, dv, dbound, dinitial


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    return x.stride()[:3]


class Launches:
    """The launches over one set of inputs."""

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens):
        self.q, self.f, self.bound, self.scale = q, f, lower_bound, scale
        self.H, self.K, self.V = q.shape[2], q.shape[3], v.shape[3]
        self.config = Config.of(q.dtype, self.K, self.V)
        self.chunks = Chunks.of(q, cu_seqlens, self.config.C)
        self.NK = self.config.blocks(self.K)
        self.segments, self.segment_length = self._segments()
        self.slow = torch.zeros(self.chunks.NC, self.H, self.NK, dtype=torch.int8, device=q.device)
        # pointers that a kernel does not read still need a tensor
        self.tables = [x if x is not None else q for x in (self.chunks.sequence, self.chunks.first)]
        self.cu_seqlens = q if self.chunks.cu_seqlens is None else self.chunks.cu_seqlens
        self.bound_or_any = q if lower_bound is None else lower_bound
        self.common = dict(
            H=self.H,
            K=self.K,
            V=self.V,
            C=self.config.C,
            DT=self.config.tl_dtype,
            BOUNDED=lower_bound is not None,
            PACKED=cu_seqlens is not None,
            FULL=cu_seqlens is None and q.shape[1] % self.config.C == 0,
            num_warps=self.config.warps,
        )

    def _segments(self) -> tuple[int, int]:
        """Segments of a sequence and chunks of a segment: enough programs to fill a GPU, 8 chunks at least."""
        NT = self.chunks.per_row
        programs = self.chunks.N * self.H * self.NK * triton.cdiv(self.V, self.config.state_BV)
        wanted = min(triton.cdiv(FILL, programs), NT // 8)
        if wanted < 2:
            return 1, self.chunks.NC
        length = triton.cdiv(NT, wanted)
        return triton.cdiv(NT, length), length

    def states(self, y: Tensor, first: Tensor | None, reverse: bool = False) -> tuple[Tensor, Tensor]:
        """States at the chunks' borders [NC, H, K, V], and the one at the end of each sequence [N, H, K, V] fp32."""
        N, segments = self.chunks.N, self.segments
        first = None if first is None else first.contiguous()
        states = y.new_empty(self.chunks.NC, self.H, self.K, self.V, dtype=self.config.dtype)
        last = y.new_empty(N * segments, self.H, self.K, self.V, dtype=torch.float32)
        if segments == 1:
            self._walk(y, first, states, last, reverse)
            return states, last
        decays = y.new_empty(N * segments, self.H, self.K, dtype=torch.float32)
        self._walk(y, None, None, last, reverse, decays)
        entering, last = last, y.new_empty(N, self.H, self.K, self.V, dtype=torch.float32)
        segment_scan_kernel[(N * self.H, triton.cdiv(self.K, 16))](
            last if first is None else first,
            entering,
            decays,
            last,
            segments,
            H=self.H,
            K=self.K,
            V=self.V,
            BK=16,
            BV=self.config.BV,
            REVERSE=reverse,
            HAS_FIRST=first is not None,
        )
        self._walk(y, entering, states, torch.empty_like(entering), reverse)
        return states, last

    def _walk(self, y, first, states, last, reverse, decays=None):
        """One pass of chunk_state over all segments; without `states` it finds `decays` too and stores no more."""
        grid = (self.chunks.N * self.segments * self.H * self.NK * triton.cdiv(self.V, self.config.state_BV),)
        chunk_state_kernel[grid](
            self.q,
            self.f,
            y,
            self.bound_or_any,
            last if first is None else first,
            last if states is None else states,
            self.slow,
            last,
            last if decays is None else decays,
            self.cu_seqlens,
            self.tables[1],
            *_strides(self.q),
            *_strides(self.f),
            *_strides(y),
            self.scale,
            self.chunks.T,
            self.chunks.per_row,
            self.segments,
            self.segment_length,
            BK=self.config.BK,
            BV=self.config.state_BV,
            REVERSE=reverse,
            STORE=states is not None,
            HAS_FIRST=first is not None,
            STAGES=self.config.stages,
            **self.common,
        )

    def output(self, y: Tensor, states: Tensor, reverse: bool = False) -> Tensor:
        """o from v and the entering states, or dv from do and the gradients of the leaving ones: [B, T, H, V]."""
        out = y.new_empty(y.shape)
        for exact in (False, True):
            group = self.config.group if exact else self.config.output_group
            chunk_output_kernel[(triton.cdiv(self.chunks.NC, group) * self.H,)](
                self.q,
                self.f,
                y,
                self.bound_or_any,
                states,
                self.slow,
                out,
                self.cu_seqlens,
                *self.tables,
                *_strides(self.q),
                *_strides(self.f),
                *_strides(y),
                *_strides(out),
                self.scale,
                self.chunks.T,
                self.chunks.per_row,
                self.chunks.NC,
                LEVELS=self.config.C.bit_length() - 1,
                BK=self.config.BK,
                BV=self.config.BV,
                REVERSE=reverse,
                EXACT=exact,
                GROUP=group,
                STAGES=1 if exact else self.config.output_stages,
                **self.common,
            )
        return out

    def gradients(self, v: Tensor, do: Tensor, states: Tensor, dstates: Tensor):
        """dq, df [B, T, H, K] and the bound's gradient [H, K], None without a bound."""
        dq, df = self.q.new_empty(self.q.shape), self.f.new_empty(self.f.shape)
        # chunks beyond the last one of packed sequences write nothing
        dbound = None if self.bound is None else self.bound.new_zeros(self.chunks.NC, self.H, self.K)
        for exact in (False, True):
            group = self.config.group if exact else self.config.gradient_group
            chunk_gradient_kernel[(triton.cdiv(self.chunks.NC, group) * self.H * self.NK,)](
                self.q,
                self.f,
                v,
                do,
                self.bound_or_any,
                states,
                dstates,
                self.slow,
                dq,
                df,
                dq if dbound is None else dbound,
                self.cu_seqlens,
                *self.tables,
                *_strides(self.q),
                *_strides(self.f),
                *_strides(v),
                *_strides(do),
                *_strides(dq),
                *_strides(df),
                self.scale,
                self.chunks.T,
                self.chunks.per_row,
                self.chunks.NC,
                LEVELS=self.config.C.bit_length() - 1,
                BK=self.config.BK,
                BV=self.config.BV,
                EXACT=exact,
                GROUP=group,
                **self.common,
            )
        return dq, df, None if dbound is None else dbound.sum(0)
