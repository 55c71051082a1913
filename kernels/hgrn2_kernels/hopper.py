"""The operator on Hopper: a forward and a backward in one pass each over the chunks.

Forward: hopper_forward_kernel, then chunk_output for the chunks beyond the fast limit. Backward:
hopper_backward_kernel, then chunk_output in reverse and chunk_gradient for those chunks. Where sequences are cut into
segments, chunk_state finds before each what enters them. Which chunks are beyond the limit stays on the device: a
chunk within it has 0 bands, with which the kernels of the other chunks do nothing.

`chunk_forward` and `chunk_backward` take the arguments of chunk_triton's, and return what those return. dispatch.py
says which of them run.
"""

import dataclasses
import functools

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hgrn2_kernels.chunk_plan import KEPT, Chunks, Plan, Segments
from hgrn2_kernels.chunk_triton import Launches, _chunk_gradient, dense_like
from hgrn2_kernels.hopper_backward import hopper_backward_kernel
from hgrn2_kernels.hopper_forward import hopper_forward_kernel
from hgrn2_kernels.hopper_math import BORDER

# head dimension, the only one there is
D = 128
# programs that an H100 runs at a time, one on each multiprocessor
PROGRAMS = 132
# registers of a thread that makes operands, forward and backward: what is left goes to the products
FORWARD_REGS, BACKWARD_REGS = 104, 104


def chunk_forward(q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state=True, save_states=False):
    """As chunk_triton.chunk_forward, for what dispatch.py sends here; saved bands are int32, 0 within the limit."""
    q, f, v = (by_tma(x) for x in (q, f, v))
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, lower_bound, scale, cu_seqlens)
        first = None if initial_state is None else initial_state.contiguous()
        entering = last = None
        if run.plan.segments.cut:
            added, decays = run._segment_totals(v, False)
            entering, last, _ = run._scan(added, decays, first, None, False)
            first = entering
        elif output_final_state:
            last = run._per_segment(v, D)
        o = dense_like(v)
        states = run.forward(v, first, o, None if run.plan.segments.cut else last)
        run.output(v, states, o)
    last = last if output_final_state else None
    if save_states:
        return o, last, (states, run.bands)
    return o, last, (entering,) if run.plan.keeps_entering else ()


def chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, scale, saved=(), into=None):
    """As chunk_triton.chunk_backward, for what dispatch.py sends here."""
    wanted = [dense_like(x) for x in (q, f, v)] if into is None else into
    # of what TMA cannot write, a copy that it can
    dq, df, dv = (x if movable(x) else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)
    q, f, v, do = (by_tma(x) for x in (q, f, v, do))
    states, bands = saved if len(saved) == 2 else (None, None)
    wants_last = initial_state is not None
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, lower_bound, scale, cu_seqlens, bands)
        if states is None:
            states, *_ = run.states(v, initial_state, wants_last=False, entering=saved[0] if saved else None)
            # chunk_state counts one band within the limit
            run.bands.mul_(run.bands > 1)
        first = None if dfinal_state is None else dfinal_state.contiguous()
        dinitial = None
        if run.plan.segments.cut:
            added, decays = run._segment_totals(do, True)
            first, dinitial, _ = run._scan(added, decays, first, None, True)
        elif wants_last:
            dinitial = run._per_segment(do, D)
        last = None if run.plan.segments.cut else dinitial
        dbound = run.backward(v, do, states, first, dq, df, dv, last)
    for x, y in zip(wanted, (dq, df, dv), strict=True):
        if x is not y:
            x.copy_(y)
    return dq, df, dv, dbound, dinitial if wants_last else None


def movable(x: Tensor) -> bool:
    """Return whether TMA can read and write x [B, T, H, D]: rows of D numbers, at addresses in steps of 16 bytes."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)
    return aligned and x.stride(-1) == 1 and min(steps, default=1) > 0


def by_tma(x: Tensor) -> Tensor:
    return x if movable(x) else x.clone(memory_format=torch.contiguous_format)


def segments(chunks: Chunks, C: int, H: int) -> Segments:
    """The cut of sequences that leaves the fewest multiprocessors idle: 8 chunks a segment at least.

    A kernel here takes as long as its longest multiprocessor. Two segments of a sequence gain half of that, which is
    more than the pass over the segments that comes first costs.
    """
    wanted = PROGRAMS // (chunks.N * H)
    if chunks.per_row:
        wanted = min(wanted, chunks.per_row // 8)
    if wanted < 2:
        return Segments(chunks.N, chunks.NC)
    if chunks.per_row:
        length = triton.cdiv(chunks.per_row, wanted)
        per_sequence = triton.cdiv(chunks.per_row, length)
        return Segments(chunks.N * per_sequence, length, per_sequence)
    length = max(8, triton.cdiv(chunks.NC, chunks.N * wanted))
    return Segments(Chunks.of(1, chunks.T, chunks.N, C * length).NC, length, 0)


@functools.lru_cache(maxsize=1024)
def _plan(plan: Plan, tokens: int) -> Plan:
    """The plan of the kernels here, from chunk_triton's of `tokens` tokens: the launches of each are its own."""
    cut = segments(plan.chunks, plan.config.C, plan.H)
    state = cut.count * plan.K * plan.V * 4
    return dataclasses.replace(
        plan,
        segments=cut,
        keeps_entering=cut.cut and state <= KEPT * tokens * (2 * plan.K + plan.V) * 2,
        # parts of the bound's gradient, see _bound_parts
        numbers=plan.numbers | {"NC": plan.chunks.NC + cut.count},
    )


def descriptor(x: Tensor, C: int, packed: bool) -> TensorDescriptor:
    """Tiles [C, D] of one head of x [B, T, H, D], cut off at the end of a sequence.

    TMA fills what lies outside of a tensor with zeros and does not write there. In a dense batch the end is that of a
    row. For packed sequences two more dimensions put the end of any sequence at number BORDER of a third: their
    coordinates (BORDER, end, BORDER - end + t) lead to token t, because addresses wrap around at 2^64 bytes. It is the
    way of triton.tools.ragged_tma.
    """
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5 if packed else 4)
    B, T, H, _ = x.shape
    # where there is one of something, torch leaves the stride open
    b, t, h = (D if size == 1 else stride for size, stride in zip((B, T, H), x.stride()[:3], strict=True))
    if packed:
        many, around = 0x7FFF0000, 2**34
        shape, stride = [many, many, BORDER.value, H, D], [around - t, t, t, h, 1]
        return TensorDescriptor(x, shape, stride, [1, 1, C, 1, D], layout)
    return TensorDescriptor(x, [B, T, H, D], [b, t, h, 1], [1, C, 1, D], layout)


def state_descriptor(states: Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(states, [states.numel() // D, D], [D, 1], [D, D], layout)


class HopperLaunches(Launches):
    """The launches over one set of inputs; those of chunk_state, chunk_output and chunk_gradient are inherited."""

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens, bands=None):
        packed = cu_seqlens is not None
        B, T, H, K = q.shape
        if bands is None:
            NC = Chunks.of(B, T, cu_seqlens.shape[0] - 1 if packed else None, 64).NC
            bands = q.new_zeros((NC, H, K // 64), dtype=torch.int32)
        super().__init__(q, f, v, lower_bound, scale, cu_seqlens, bands)
        whole, self.plan = self.plan.segments, _plan(self.plan, B * T)
        if self.plan.segments.tabled and self.plan.segments != whole:
            self._number_segments(cu_seqlens)

    def _shared(self) -> tuple[tuple, dict]:
        """Arguments that the two kernels here share."""
        plan = self.plan
        tables = self.cu_seqlens, self.chunk_first, self.segment_sequence, self.segment_first
        numbers = {name: plan.numbers[name] for name in ("inverse_scale", "T", "NT")}
        constants = {name: plan.numbers[name] for name in ("H", "K", "V", "C", "BOUNDED", "PACKED", "FULL")}
        cut = plan.segments
        tabled = dict(SEGMENTS=cut.per_sequence, LENGTH=cut.length, TABLED=cut.tabled)
        return (self.sums, self.ones, *tables), numbers | constants | tabled

    def _tiles(self, x: Tensor) -> TensorDescriptor:
        return descriptor(x, self.plan.config.C, self.plan.packed)

    def forward(self, v: Tensor, first: Tensor | None, o: Tensor, last: Tensor | None) -> Tensor:
        """Fill o [B, T, H, V] and, where given, last; returns the states [NC, H, K, V]. Counts the bands.

        Args:
            v: [B, T, H, V].
            first: [segments, H, K, V] fp32, states before the segments; zeros when None.
            o: right but for chunks beyond the limit.
            last: [segments, H, K, V] fp32, takes the states after the segments.
        """
        plan = self.plan
        states = v.new_empty((plan.chunks.NC, plan.H, plan.K, plan.V))
        tensors, others = self._shared()
        hopper_forward_kernel[(plan.segments.count * plan.H,)](
            *(self._tiles(self.q), self._tiles(self.f), self._tiles(v), state_descriptor(states), self._tiles(o)),
            *(self.bound, *(self.none if x is None else x for x in (first, last)), self.bands),
            *tensors,
            **others,
            HAS_FIRST=first is not None,
            LAST=last is not None,
            REGS=FORWARD_REGS,
            num_warps=8,
        )
        return states

    def backward(
        self,
        v: Tensor,
        do: Tensor,
        states: Tensor,
        first: Tensor | None,
        dq: Tensor,
        df: Tensor,
        dv: Tensor,
        last: Tensor | None,
    ) -> Tensor | None:
        """Fill dq, df, dv and, where given, last; returns the bound's gradient [H, K], None without a bound.

        Args:
            v, do: [B, T, H, V].
            states: of the forward.
            first: [segments, H, K, V] fp32, gradients of the states after the segments; zeros when None.
            last: [segments, H, K, V] fp32, takes the gradients of the states before the segments.
        """
        plan = self.plan
        # of chunks beyond the limit alone; the others' memory is not touched
        dstates = torch.empty_like(states)
        parts = self._bound_parts()
        tensors, others = self._shared()
        hopper_backward_kernel[(plan.segments.count * plan.H,)](
            *(self._tiles(x) for x in (self.q, self.f, v, do)),
            *(state_descriptor(states), state_descriptor(dstates)),
            *(self._tiles(x) for x in (dv, dq, df)),
            *(self.bound, *(self.none if x is None else x for x in (first, last)), self.bands, parts),
            *tensors,
            **others,
            NC=plan.numbers["NC"],
            parts=plan.chunks.NC,
            HAS_FIRST=first is not None,
            LAST=last is not None,
            REGS=BACKWARD_REGS,
            num_warps=8,
        )
        self.output(do, dstates, dv, reverse=True)
        return self.gradients(v, do, states, dstates, dq, df, parts)

    def _bound_parts(self) -> Tensor:
        """Zeros [H, K, chunks + segments] fp32: parts of the bound's gradient, of chunks beyond the limit first."""
        plan = self.plan
        return self.bound.new_zeros((plan.H, plan.K, plan.numbers["NC"])) if plan.bounded else self.none

    def gradients(self, v, do, states, dstates, dq, df, parts: Tensor | None = None) -> Tensor | None:
        """As of Launches, of the chunks beyond the limit; parts is what there is of the bound's gradient."""
        plan = self.plan
        parts = self._bound_parts() if parts is None else parts
        launch = _chunk_gradient(plan, v.stride(), do.stride(), dq.stride(), df.stride())
        launch(
            *(self.q, self.f, v, do, self.bound, states, dstates, self.bands, dq, df, parts, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first),
        )
        return parts.sum(-1) if plan.bounded else None
