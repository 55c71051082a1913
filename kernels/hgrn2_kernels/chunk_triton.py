"""The operator on a GPU: launches of the chunk kernels.

Forward: chunk_state, chunk_output. Backward: chunk_state again unless states are kept, chunk_state
in reverse, chunk_output in reverse for dv, chunk_gradient. Nothing waits for the device: which chunks take the exact
path is a flag that chunk_state leaves in memory.
"""

import functools
import math

import torch
from torch import Tensor

from hgrn2_kernels.chunk_gradient import chunk_gradient_kernel
from hgrn2_kernels.chunk_output import chunk_output_kernel
from hgrn2_kernels.chunk_plan import Plan, strides, table
from hgrn2_kernels.chunk_state import chunk_state_kernel, segment_scan_kernel
from hgrn2_kernels.launch import Launch
from hgrn2_kernels.matrices import matrices
from hgrn2_kernels.strides import dense_like, unit_stride

# launches kept of each kernel: a program whose shapes change all the time makes new ones
KEPT = 4096


def chunk_forward(q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state=True, save_states=False):
    """Output of the chunk kernels and what a backward may want to keep.

    Args:
        q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states: as in `chunk_hgrn2`, on
            one device.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32; None unless asked for.
        saved: what spares the backward some work. With save_states, the states [chunks, H, K, V] of `Config.dtype`
            that enter the chunks, decayed towards their middle, and [chunks, H, blocks of K] int8, how many bands
            of decay a chunk has. Without, the states [segments, H, K, V] fp32 that enter the segments, or nothing.
    """
    q, f, v = (unit_stride(x) for x in (q, f, v))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens)
        states, final_state, entering = run.states(v, initial_state, wants_last=output_final_state)
        o = dense_like(v)
        run.output(v, states, o)
    final_state = final_state if output_final_state else None
    if save_states:
        return o, final_state, (states, run.bands)
    return o, final_state, (entering,) if run.plan.keeps_entering else ()


def chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, scale, saved=(), into=None):
    """Gradients of q, f, v, lower_bound and the initial state, None for what is not there.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dfinal_state: [N, H, K, V] fp32, or None.
        q, f, v, lower_bound, initial_state, cu_seqlens, scale: of the forward.
        saved: of the forward; what is not there is computed again.
        into: tensors that take the gradients of q, f and v, the last dimension contiguous; new ones when None.
    """
    dq, df, dv = (dense_like(x) for x in (q, f, v)) if into is None else into
    q, f, v, do = (unit_stride(x) for x in (q, f, v, do))
    states, bands = saved if len(saved) == 2 else (None, None)
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, cu_seqlens, bands)
        if states is None:
            states, *_ = run.states(v, initial_state, wants_last=False, entering=saved[0] if saved else None)
        wants_last = initial_state is not None
        dstates, dinitial, _ = run.states(do, dfinal_state, reverse=True, wants_last=wants_last)
        run.output(do, dstates, dv, reverse=True)
        dbound = run.gradients(v, do, states, dstates, dq, df)
    return dq, df, dv, dbound, dinitial if wants_last else None


class Launches:
    """The launches over one set of inputs, with the flags of the chunks where an earlier pass has set them."""

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens, bands=None):
        packed = cu_seqlens is not None
        N = cu_seqlens.shape[0] - 1 if packed else None
        self.plan = plan = Plan.of(q, f, v, lower_bound is not None, scale, N)
        if bands is None:
            # packed sequences may leave chunks over, whose flags nobody writes: there, the others write zeros
            flags = q.new_zeros if packed else q.new_empty
            bands = flags((plan.chunks.NC, plan.H, plan.blocks), dtype=torch.int8)
        self.bands = bands
        self.bound = bands if lower_bound is None else lower_bound.contiguous()
        self.q, self.f = q, f
        self.sums, self.ones = matrices(q.device, plan.config.C, plan.config.dtype)
        # pointers that a kernel does not read or write still need a tensor
        self.none = bands
        self.cu_seqlens = self.chunk_sequence = self.chunk_first = self.none
        self.segment_sequence = self.segment_first = self.none
        if packed:
            self.cu_seqlens = cu_seqlens.contiguous()
            self.chunk_sequence, self.chunk_first = table(cu_seqlens, plan.config.C, plan.chunks.NC)
        if plan.segments.tabled:
            self._number_segments(cu_seqlens)

    def _number_segments(self, cu_seqlens: Tensor) -> None:
        """Say which segments of packed sequences belong to which sequence."""
        plan = self.plan
        size = plan.config.C * plan.segments.length
        sequence, self.segment_first = table(cu_seqlens, size, plan.segments.count)
        # a segment beyond the last is one of the last sequence, and starts after its end
        self.segment_sequence = sequence.clamp_(max=plan.chunks.N - 1)

    def states(
        self,
        y: Tensor,
        first: Tensor | None,
        reverse: bool = False,
        wants_last: bool = True,
        entering: Tensor | None = None,
        rows: Tensor | None = None,
        parts: tuple[Tensor, Tensor] | None = None,
    ):
        """The states of one direction.

        Args:
            y: [B, T, H, V], v or do.
            first: [N, H, K, V] fp32, states at the sequences' beginnings (ends where reverse); zeros when None.
            entering: of an earlier call, which spares a pass over the segments.
            rows: [N] int32, the row of first that each sequence takes, -1 for zeros; None for its own.
            parts: of `totals`, which spare that pass too; overwritten.

        Returns:
            states: [NC, H, K, V], at the chunks' borders.
            last: [N, H, K, V] fp32, at the other ends of the sequences; None where entering is given, and perhaps where
                it is not wanted.
            entering: [segments, H, K, V] fp32, at the segments' beginnings; None where sequences are whole.
        """
        plan = self.plan
        first = None if first is None else first.contiguous()
        last = None
        states = y.new_empty((plan.chunks.NC, plan.H, plan.K, plan.V), dtype=plan.config.dtype)
        if not plan.segments.cut:
            last = self._per_segment(y, plan.V) if wants_last else None
            self._walk(y, reverse, first, rows, states=states, last=last)
        else:
            if entering is None:
                added, decays = parts or self._segment_totals(y, reverse)
                entering, last, _ = self._scan(added, decays, first, rows, reverse)
            self._walk(y, reverse, entering, None, states=states)
        return states, last, entering

    def totals(self, y: Tensor, reverse: bool = False):
        """What each sequence does to a state that passes it.

        Returns:
            state: [N, H, K, V] fp32, after the sequence from zeros before it (before it where reverse).
            log_decay: [N, H, K] fp32, nats.
            parts: state and log2 decay of each segment; None where sequences are whole.
        """
        added, decays = parts = self._segment_totals(y, reverse)
        if not self.plan.segments.cut:
            return added, decays * math.log(2), None
        _, state, decay = self._scan(added.clone(), decays, None, None, reverse)
        return state, decay * math.log(2), parts

    def _per_segment(self, like, *more):
        return like.new_empty((self.plan.segments.count, self.plan.H, self.plan.K, *more), dtype=torch.float32)

    def _segment_totals(self, y, reverse):
        """What each segment adds to a state that passes it, and the log2 decay of that state."""
        added, decays = self._per_segment(y, self.plan.V), self._per_segment(y)
        self._walk(y, reverse, None, None, last=added, decays=decays)
        return added, decays

    def _scan(self, added, decays, first, rows, reverse):
        """States that enter the segments, in the place of added; of each sequence, state at the end and log2 decay."""
        last, total = (x.new_empty((self.plan.chunks.N, *x.shape[1:])) for x in (added, decays))
        launch = _segment_scan(self.plan, reverse, first is not None, rows is not None)
        first, rows = (self.none if x is None else x for x in (first, rows))
        launch(first, rows, added, decays, last, total, self.segment_first)
        return added, last, total

    def _walk(self, y, reverse, first, rows, states=None, last=None, decays=None):
        """One pass of chunk_state over all segments, for what is given to fill."""
        given = [x is not None for x in (first, rows, states, last, decays)]
        first, rows, states, last, decays = (self.none if x is None else x for x in (first, rows, states, last, decays))
        launch = _chunk_state(self.plan, y.stride(), reverse, *given)
        launch(
            *(self.q, self.f, y, self.bound, first, rows, states, self.bands, last, decays, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_first, self.segment_sequence, self.segment_first),
        )

    def output(self, y: Tensor, states: Tensor, out: Tensor, reverse: bool = False):
        """Fill out [B, T, H, V]: o from v and the entering states, or dv from do and the gradients of the leaving."""
        launch = _chunk_output(self.plan, y.stride(), out.stride(), reverse)
        launch(
            *(self.q, self.f, y, self.bound, states, self.bands, out, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first),
        )

    def gradients(self, v: Tensor, do: Tensor, states: Tensor, dstates: Tensor, dq: Tensor, df: Tensor):
        """Fill dq and df [B, T, H, K]; returns the bound's gradient [H, K], None without a bound."""
        plan = self.plan
        dbound = self.none
        if plan.bounded:
            # packed sequences may leave chunks over, which add nothing
            parts = self.bound.new_zeros if plan.packed else self.bound.new_empty
            dbound = parts((plan.H, plan.K, plan.chunks.NC))
        launch = _chunk_gradient(plan, v.stride(), do.stride(), dq.stride(), df.stride())
        launch(
            *(self.q, self.f, v, do, self.bound, states, dstates, self.bands, dq, df, dbound, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first),
        )
        return dbound.sum(-1) if plan.bounded else None


@functools.lru_cache(maxsize=KEPT)
def _chunk_state(plan, stride_y, reverse, has_first, rows, states, last, decays):
    config, segments = plan.config, plan.segments
    return Launch(
        chunk_state_kernel,
        (segments.count * plan.state_programs,),
        config.state_warps,
        **plan.numbers,
        **strides("y", stride_y),
        SEGMENTS=segments.per_sequence,
        LENGTH=segments.length,
        TABLED=segments.tabled,
        BK=config.BK,
        BV=config.state_BV,
        REVERSE=reverse,
        HAS_FIRST=has_first,
        ROWS=rows,
        STATES=states,
        LAST=last,
        DECAYS=decays,
        STAGES=plan.reverse_stages if reverse else plan.state_stages,
    )


@functools.lru_cache(maxsize=KEPT)
def _segment_scan(plan, reverse, has_first, rows):
    return Launch(
        segment_scan_kernel,
        (plan.chunks.N * plan.H, -(-plan.K // 16)),
        4,
        **plan.numbers,
        SEGMENTS=plan.segments.per_sequence,
        TABLED=plan.segments.tabled,
        BK=16,
        BV=plan.config.BV,
        REVERSE=reverse,
        HAS_FIRST=has_first,
        ROWS=rows,
    )


@functools.lru_cache(maxsize=KEPT)
def _chunk_output(plan, stride_y, stride_o, reverse):
    config = plan.config
    return Launch(
        chunk_output_kernel,
        (plan.output_programs,),
        config.output_warps,
        **plan.numbers,
        **strides("y", stride_y),
        **strides("o", stride_o),
        BK=config.BK,
        BV=config.BV,
        REVERSE=reverse,
        STAGES=config.output_stages,
    )


@functools.lru_cache(maxsize=KEPT)
def _chunk_gradient(plan, stride_v, stride_do, stride_dq, stride_df):
    BK, warps = plan.config.gradient
    return Launch(
        chunk_gradient_kernel,
        (plan.gradient_programs,),
        warps,
        **plan.numbers,
        **strides("v", stride_v),
        **strides("o", stride_do),
        **strides("dq", stride_dq),
        **strides("df", stride_df),
        BK=BK,
        BF=plan.config.BK,
        BV=plan.config.BV,
        AHEAD=plan.config.gradient_ahead,
    )
