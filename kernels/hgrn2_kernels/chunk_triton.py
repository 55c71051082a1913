"""The operator on a GPU: the launches of the chunk kernels.

The forward launches chunk_state and chunk_output. The backward launches chunk_state again unless the states were saved,
then chunk_state in reverse, chunk_output in reverse for dv, and chunk_gradient. Nothing waits for the device:
chunk_state leaves a count of bands for each chunk in device memory, and the other kernels choose their form by it.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hgrn2_kernels.chunk_gradient import chunk_gradient_kernel
from hgrn2_kernels.chunk_output import chunk_output_kernel
from hgrn2_kernels.chunk_plan import FILL, Plan, strides, table
from hgrn2_kernels.chunk_state import chunk_state_kernel, segment_scan_kernel
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.launch import Launch
from hgrn2_kernels.matrices import matrices
from hgrn2_kernels.strides import dense_like, unit_stride

# the number of launches that are cached for each kernel; a program whose shapes change all the time adds new ones
CACHED_LAUNCHES = 4096


def chunk_forward(inputs: Inputs, output_final_state=True, save_states=False):
    """Return the output of the chunk kernels, the final state, and tensors that save the backward some work.

    Args:
        inputs: the inputs, on one CUDA device.
        output_final_state, save_states: as in `chunk_hgrn2`.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32; None without output_final_state.
        saved: a tuple of tensors for the backward. With save_states it holds the states [chunks, H, K, V] of
            `Config.dtype` that enter the chunks, decayed towards their middle, and the counts of bands
            [chunks, H, blocks of K] int8. Without save_states it holds the states [segments, H, K, V] fp32 that enter
            the segments, or nothing.
    """
    q, f, v = Launches.readable(*inputs[:3])
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        o = dense_like(v)
        states, final_state, entering = run.run_forward(v, inputs.initial_state, o, output_final_state)
    final_state = final_state if output_final_state else None
    if save_states:
        return o, final_state, (states, run.bands)
    return o, final_state, (entering,) if run.plan.keeps_entering else ()


def chunk_backward(do, dfinal_state, inputs: Inputs, saved=(), into=None):
    """Return the gradients of q, f, v, lower_bound and the initial state, or None for an input that is None.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dfinal_state: [N, H, K, V] fp32, or None.
        inputs: the inputs of the forward.
        saved: the tuple that the forward returned. What it does not hold is computed again.
        into: tensors to write the gradients of q, f and v to, with a contiguous last dimension. None means new ones.
    """
    dq, df, dv = (dense_like(x) for x in inputs[:3]) if into is None else into
    q, f, v, do = Launches.readable(*inputs[:3], do)
    initial = inputs.initial_state
    states, bands = saved if len(saved) == 2 else (None, None)
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens, bands)
        if states is None:
            states, *_ = run.states(v, initial, wants_final=False, entering=saved[0] if saved else None)
        wants_final = initial is not None
        dbound, dinitial = run.run_backward(v, do, states, dfinal_state, dq, df, dv, wants_final)
    return dq, df, dv, dbound, dinitial if wants_final else None


class Launches:
    """The launches over one set of inputs. `bands` are the counts of an earlier pass, if there was one."""

    @staticmethod
    def readable(*tensors: Tensor) -> Sequence[Tensor]:
        """Return the tensors [B, T, ..], where those that the kernels cannot read are replaced by copies."""
        return [unit_stride(x) for x in tensors]

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens, bands=None):
        packed = cu_seqlens is not None
        N = cu_seqlens.shape[0] - 1 if packed else None
        self.plan = plan = self._plan(Plan.of(q, f, v, lower_bound is not None, scale, N))
        self.bands = bands = self._new_bands(q) if bands is None else bands
        self.bound = bands if lower_bound is None else lower_bound.contiguous()
        self.q, self.f = q, f
        self.sums, self.ones = matrices(q.device, plan.config.C, plan.config.dtype)
        # a kernel needs a tensor for each pointer, also for one that it does not read or write
        self.none = bands
        self.cu_seqlens = self.chunk_sequence = self.chunk_first = self.none
        self.segment_sequence = self.segment_first = self.none
        if packed:
            self.cu_seqlens = cu_seqlens.contiguous()
            self.chunk_sequence, self.chunk_first = table(cu_seqlens, plan.config.C, plan.chunks.NC)
        if plan.segments.tabled:
            self._number_segments(cu_seqlens)
        # the last arguments of the kernels that walk segments, and of those whose programs have one chunk each
        shared = self.sums, self.ones, self.cu_seqlens
        self.of_segments = *shared, self.chunk_first, self.segment_sequence, self.segment_first
        self.of_chunks = *shared, self.chunk_sequence, self.chunk_first

    @staticmethod
    def _plan(plan: Plan) -> Plan:
        """Return the plan of the launches, made from the plan for these inputs."""
        return plan

    def _new_bands(self, like: Tensor) -> Tensor:
        """Return a tensor for the counts of bands [NC, H, blocks]."""
        plan = self.plan
        # With packed sequences, the last chunks may belong to no sequence. chunk_state does not write their counts, and
        # the other kernels write zeros where a count is 0.
        empty = like.new_zeros if plan.packed else like.new_empty
        return empty(plan.chunks.NC, plan.H, plan.blocks, dtype=torch.int8)

    def _number_segments(self, cu_seqlens: Tensor) -> None:
        """Find the sequence of each segment, for packed sequences."""
        plan = self.plan
        size = plan.config.C * plan.segments.length
        sequence, self.segment_first = table(cu_seqlens, size, plan.segments.count)
        # a segment beyond the last one is assigned to the last sequence, and starts after its end
        self.segment_sequence = sequence.clamp_(max=plan.chunks.N - 1)

    def run_forward(self, v, initial, o, wants_final=True, rows=None, totals=None):
        """Fill o [B, T, H, V], and return what `states` returns for v. The other arguments are those of `states`."""
        results = self.states(v, initial, wants_final=wants_final, rows=rows, totals=totals)
        self.output(v, results[0], o)
        return results

    def run_backward(self, v, do, states, dfinal, dq, df, dv, wants_final=True, rows=None, totals=None):
        """Fill dq, df and dv, and return the gradients of the bound and of the states before the sequences.

        Args:
            v, do: [B, T, H, V].
            states: the states of the forward.
            dfinal: [N, H, K, V] fp32, gradients of the states after the sequences. None means zeros.
            dq, df, dv: [B, T, H, ..], output.
            wants_final, rows, totals: as in `states`, for do and in reverse.
        """
        dstates, dinitial, _ = self.states(do, dfinal, True, wants_final, rows=rows, totals=totals)
        self.output(do, dstates, dv, reverse=True)
        return self.gradients(v, do, states, dstates, dq, df), dinitial

    def states(
        self,
        y: Tensor,
        initial: Tensor | None,
        reverse: bool = False,
        wants_final: bool = True,
        entering: Tensor | None = None,
        rows: Tensor | None = None,
        totals: tuple[Tensor, Tensor] | None = None,
    ):
        """Compute the states of one direction.

        Args:
            y: [B, T, H, V], v or do.
            initial: [N, H, K, V] fp32, states at the beginnings of the sequences (at the ends where reverse). None
                means zeros.
            entering: the third result of an earlier call, which saves a pass over the segments.
            rows: [N] int32, the row of initial that each sequence takes, -1 for zeros. None means its own row.
            totals: the third result of the method `totals`, which saves the same pass. It is overwritten.

        Returns:
            states: [NC, H, K, V], at the boundaries of the chunks.
            final: [N, H, K, V] fp32, at the other ends of the sequences. It is None where entering is given, and may be
                None without wants_final.
            entering: [segments, H, K, V] fp32, at the beginnings of the segments. None where sequences are whole.
        """
        plan = self.plan
        initial = None if initial is None else initial.contiguous()
        final = None
        states = y.new_empty(plan.chunks.NC, plan.H, plan.K, plan.V, dtype=plan.config.dtype)
        if not plan.segments.cut:
            final = self._per_segment(y, plan.V) if wants_final else None
            self._walk(y, reverse, initial, rows, states=states, final=final)
        else:
            if entering is None:
                entering, final = self._enter(y, initial, rows, totals, reverse, wants_final)
            self._walk(y, reverse, entering, None, states=states)
        return states, final, entering

    def totals(self, y: Tensor, reverse: bool = False):
        """Sum up the effect of each sequence on a state that passes it.

        Returns:
            state: [N, H, K, V] fp32, after the sequence if it is 0 before it (before and after swap where reverse).
            log_decay: [N, H, K] fp32, nats.
            segments: the same two for each segment, with the decay in log2. None where sequences are whole.
        """
        added, decays = segments = self._segment_totals(y, reverse)
        if not self.plan.segments.cut:
            return added, decays * math.log(2), None
        state, decay = self._per_sequence(y, self.plan.V), self._per_sequence(y)
        self._scan(added.clone(), decays, None, None, reverse, state, decay)
        return state, decay * math.log(2), segments

    def _filled(self, *tensors):
        """Return the tensors, and a tensor that stands for none in the place of each None."""
        return [self.none if x is None else x for x in tensors]

    def _per_segment(self, like, *more):
        return like.new_empty(self.plan.segments.count, self.plan.H, self.plan.K, *more, dtype=torch.float32)

    def _per_sequence(self, like, *more):
        return like.new_empty(self.plan.chunks.N, self.plan.H, self.plan.K, *more, dtype=torch.float32)

    def _enter(self, y, initial, rows, totals, reverse, wants_final):
        """Return the states that enter the segments, and the final states, or None without wants_final."""
        # no state enters a segment out of the last one
        left_out = int(self.plan.segments.per_sequence > 1 and totals is None and not wants_final)
        added, decays = totals or self._segment_totals(y, reverse, left_out)
        final = self._per_sequence(y, self.plan.V)
        # nothing reads the decays of whole sequences, nor the final states without wants_final
        unread = self._per_sequence(y) if wants_final else final
        self._scan(added, decays, initial, rows, reverse, final, unread, left_out)
        return added, final if wants_final else None

    def _segment_totals(self, y, reverse, left_out=0):
        """Return what each segment adds to a state that passes it, and the log2 decay of that state.

        With left_out=1, the entries of the last segment of each sequence (the first where reverse) are not written.
        """
        added, decays = self._per_segment(y, self.plan.V), self._per_segment(y)
        self._walk(y, reverse, None, None, final=added, decays=decays, left_out=left_out)
        return added, decays

    def _scan(self, added, decays, initial, rows, reverse, final, total, left_out=0):
        """Step the states over the segments, whose totals were computed with the same left_out.

        The states that enter the segments overwrite added. For each sequence, final gets the state after it, and total
        the log2 decay. With left_out=1, these two do not count the segment left out.
        """
        launch = _segment_scan(self.plan, reverse, initial is not None, rows is not None, left_out)
        launch(*self._filled(initial, rows), added, decays, final, total, self.segment_first)

    def _walk(self, y, reverse, initial, rows, states=None, final=None, decays=None, left_out=0):
        """Launch chunk_state over the segments. It fills states, final and decays where they are given."""
        launch = _chunk_state(
            *(self.plan, y.stride(), reverse, left_out, initial is not None, rows is not None),
            *(states is not None, final is not None, decays is not None),
        )
        initial, rows, states, final, decays = self._filled(initial, rows, states, final, decays)
        launch(self.q, self.f, y, self.bound, initial, rows, states, self.bands, final, decays, *self.of_segments)

    def output(self, y: Tensor, states: Tensor, out: Tensor, reverse: bool = False):
        """Fill out [B, T, H, V]: o from v and the entering states, or dv from do and the leaving states' gradients."""
        launch = _chunk_output(self.plan, y.stride(), out.stride(), reverse)
        launch(self.q, self.f, y, self.bound, states, self.bands, out, *self.of_chunks)

    def gradients(self, v: Tensor, do: Tensor, states: Tensor, dstates: Tensor, dq: Tensor, df: Tensor):
        """Fill dq and df [B, T, H, K], and return the gradient of the bound [H, K], or None without a bound."""
        plan = self.plan
        dbound = self.none
        if plan.bounded:
            # with packed sequences, the contributions of chunks that belong to no sequence stay 0
            parts = self.bound.new_zeros if plan.packed else self.bound.new_empty
            dbound = parts(plan.H, plan.K, plan.chunks.NC)
        launch = _chunk_gradient(plan, v.stride(), do.stride(), dq.stride(), df.stride())
        launch(self.q, self.f, v, do, self.bound, states, dstates, self.bands, dq, df, dbound, *self.of_chunks)
        return dbound.sum(-1) if plan.bounded else None


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _chunk_state(plan, stride_y, reverse, left_out, has_initial, rows, states, final, decays):
    config, segments = plan.config, plan.segments
    programs = (segments.count - left_out * plan.chunks.N) * plan.state_programs
    stages = config.state_stages
    if reverse:
        stages = config.alone_stages if programs <= FILL // 2 else config.reverse_stages
    return Launch(
        chunk_state_kernel,
        (programs,),
        config.state_warps,
        **plan.numbers,
        **strides("y", stride_y),
        SEGMENTS=segments.per_sequence,
        LEFT_OUT=left_out,
        LENGTH=segments.length,
        TABLED=segments.tabled,
        BK=config.BK,
        BV=config.state_BV,
        REVERSE=reverse,
        HAS_INITIAL=has_initial,
        ROWS=rows,
        STATES=states,
        FINAL=final,
        DECAYS=decays,
        STAGES=stages,
    )


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _segment_scan(plan, reverse, has_initial, rows, left_out):
    return Launch(
        segment_scan_kernel,
        (plan.chunks.N * plan.H, -(-plan.K // 16)),
        4,
        **plan.numbers,
        SEGMENTS=plan.segments.per_sequence,
        LEFT_OUT=left_out,
        TABLED=plan.segments.tabled,
        BK=16,
        BV=plan.config.BV,
        REVERSE=reverse,
        HAS_INITIAL=has_initial,
        ROWS=rows,
    )


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
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


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _chunk_gradient(plan, stride_v, stride_do, stride_dq, stride_df):
    BK, warps = plan.config.gradient
    return Launch(
        chunk_gradient_kernel,
        (plan.gradient_programs,),
        warps,
        **plan.numbers,
        **strides("v", stride_v),
        **strides("do", stride_do),
        **strides("dq", stride_dq),
        **strides("df", stride_df),
        BK=BK,
        BF=plan.config.BK,
        BV=plan.config.BV,
        AHEAD=plan.config.gradient_ahead,
    )
