"""The operator on Hopper: a forward and a backward with one pass each over the chunks.

The forward launches hopper_forward_kernel, then chunk_output for the chunks beyond the fast limit. The backward
launches hopper_backward_kernel, then chunk_output in reverse and chunk_gradient for those chunks. Where sequences are
cut into segments, chunk_state runs first and finds the states that enter the segments. Only the device knows which
chunks are beyond the limit. A chunk within the limit has the count WITHIN instead of a number of bands, and
chunk_output and chunk_gradient skip it. For packed sequences, these two also write zeros for the tokens after the last
boundary.

`chunk_forward` and `chunk_backward` have the arguments and results of those in chunk_triton.py. dispatch.py chooses
between the two modules.
"""

import dataclasses
import functools

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hgrn2_kernels.chunk_plan import ENTERING_SHARE, Chunks, Plan, Segments
from hgrn2_kernels.chunk_triton import Launches, _chunk_gradient
from hgrn2_kernels.hopper_backward import hopper_backward_kernel
from hgrn2_kernels.hopper_forward import hopper_forward_kernel
from hgrn2_kernels.hopper_math import BORDER
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.strides import dense_like, suits

# the only head dimension that these kernels support
D = 128
# the number of programs that an H100 runs at a time, one on each multiprocessor
PROGRAMS = 132
# the count of bands of a chunk within the fast limit, which chunk_output and chunk_gradient skip
WITHIN = -1
# registers of a thread that makes operands, forward and backward; the warps of the products get the rest
FORWARD_REGS, BACKWARD_REGS = 104, 104


def chunk_forward(inputs: Inputs, output_final_state=True, save_states=False):
    """Run the forward; see chunk_triton.chunk_forward.

    The saved counts of bands are int32, and WITHIN for chunks within the limit.
    """
    q, f, v = (by_tma(x) for x in inputs[:3])
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        initial = None if inputs.initial_state is None else inputs.initial_state.contiguous()
        entering = final = None
        if run.plan.segments.cut:
            added, decays = run._segment_totals(v, False)
            entering, final, _ = run._scan(added, decays, initial, None, False)
            initial = entering
        elif output_final_state:
            final = run._per_segment(v, D)
        o = dense_like(inputs.v)
        states = run.forward(v, initial, o, None if run.plan.segments.cut else final)
        run.output(v, states, o)
    final = final if output_final_state else None
    if save_states:
        return o, final, (states, run.bands)
    return o, final, (entering,) if run.plan.keeps_entering else ()


def chunk_backward(do, dfinal_state, inputs: Inputs, saved=(), into=None):
    """Run the backward; see chunk_triton.chunk_backward."""
    wanted = [dense_like(x) for x in inputs[:3]] if into is None else into
    # if TMA cannot write the layout of an output, the kernel writes a copy, which is copied back below
    dq, df, dv = (x if movable(x) else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted)
    q, f, v, do = (by_tma(x) for x in (*inputs[:3], do))
    states, bands = saved if len(saved) == 2 else (None, None)
    wants_final = inputs.initial_state is not None
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens, bands)
        if states is None:
            entering = saved[0] if saved else None
            states, *_ = run.states(v, inputs.initial_state, wants_final=False, entering=entering)
            # chunk_state counts 1 band for a chunk within the limit
            run.bands.masked_fill_(run.bands == 1, WITHIN)
        initial = None if dfinal_state is None else dfinal_state.contiguous()
        dinitial = None
        if run.plan.segments.cut:
            added, decays = run._segment_totals(do, True)
            initial, dinitial, _ = run._scan(added, decays, initial, None, True)
        elif wants_final:
            dinitial = run._per_segment(do, D)
        final = None if run.plan.segments.cut else dinitial
        dbound = run.backward(v, do, states, initial, dq, df, dv, final)
    for x, y in zip(wanted, (dq, df, dv), strict=True):
        if x is not y:
            x.copy_(y)
    return dq, df, dv, dbound, dinitial if wants_final else None


def movable(x: Tensor) -> bool:
    """Return whether the kernels can read and write x [B, T, H, D].

    TMA needs rows of D numbers, at addresses in steps of 16 bytes. The kernels of chunk_triton.py, which also run here,
    need the tokens of a chunk in reach.
    """
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)
    return aligned and suits(x) and min(steps, default=1) > 0


def by_tma(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if the kernels cannot read x."""
    return x if movable(x) else x.clone(memory_format=torch.contiguous_format)


def cut(chunks: Chunks, C: int, H: int) -> Segments:
    """Cut sequences into segments of at least 8 chunks, such that the fewest multiprocessors are idle.

    A kernel here takes as long as its slowest multiprocessor. Two segments per sequence save half of that time, which
    is more than the additional pass over the segments costs.
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
    """Return the plan of the kernels here, made from the plan of chunk_triton.py for `tokens` tokens."""
    segments = cut(plan.chunks, plan.config.C, plan.H)
    entering = segments.count * plan.K * plan.V * 4
    return dataclasses.replace(
        plan,
        segments=segments,
        keeps_entering=segments.cut and entering <= ENTERING_SHARE * tokens * (2 * plan.K + plan.V) * 2,
        # the gradient of the bound has more parts here, see _bound_parts
        numbers=plan.numbers | {"NC": plan.chunks.NC + segments.count},
    )


def descriptor(x: Tensor, C: int, packed: bool) -> TensorDescriptor:
    """Describe tiles [C, D] of one head of x [B, T, H, D] to TMA, cut off at the end of a sequence.

    TMA reads zeros outside of a tensor and does not write there. In a dense batch, a sequence ends where its row ends.
    For packed sequences, two more dimensions place the end of any sequence at number BORDER of a third dimension:
    the coordinates (BORDER, end, BORDER - end + t) lead to token t, because addresses wrap around at 2^64 bytes.
    triton.tools.ragged_tma does the same.
    """
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=5 if packed else 4)
    B, T, H, _ = x.shape
    # torch may set any stride for a dimension of size 1
    b, t, h = (D if size == 1 else stride for size, stride in zip((B, T, H), x.stride()[:3], strict=True))
    if packed:
        many, around = 0x7FFF0000, 2**34
        shape, stride = [many, many, BORDER.value, H, D], [around - t, t, t, h, 1]
        return TensorDescriptor(x, shape, stride, [1, 1, C, 1, D], layout)
    return TensorDescriptor(x, [B, T, H, D], [b, t, h, 1], [1, C, 1, D], layout)


def state_descriptor(states: Tensor) -> TensorDescriptor:
    """Describe the states [.., D, D] to TMA, one tile per state."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(states, [states.numel() // D, D], [D, 1], [D, D], layout)


class HopperLaunches(Launches):
    """The launches over one set of inputs. It inherits the launches of chunk_state, chunk_output and chunk_gradient."""

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens, bands=None):
        B, T, H, K = q.shape
        N = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
        counts = bands is None
        if counts:
            bands = q.new_full((Chunks.of(B, T, N, 64).NC, H, K // 64), WITHIN, dtype=torch.int32)
        super().__init__(q, f, v, lower_bound, scale, cu_seqlens, bands)
        if counts and N is not None:
            # chunks after the last sequence have 0 bands, as in Launches
            bands.masked_fill_((self.chunk_sequence == N)[:, None, None], 0)
        whole, self.plan = self.plan.segments, _plan(self.plan, B * T)
        if self.plan.segments.tabled and self.plan.segments != whole:
            self._number_segments(cu_seqlens)

    def _shared(self) -> tuple[tuple, dict]:
        """Return the arguments that the two kernels here share, by position and by name."""
        plan = self.plan
        tables = self.cu_seqlens, self.chunk_first, self.segment_sequence, self.segment_first
        numbers = {name: plan.numbers[name] for name in ("inverse_scale", "T", "NT")}
        constants = {name: plan.numbers[name] for name in ("H", "K", "V", "C", "BOUNDED", "PACKED", "FULL")}
        segments = plan.segments
        tabled = dict(SEGMENTS=segments.per_sequence, LENGTH=segments.length, TABLED=segments.tabled)
        return (self.sums, self.ones, *tables), numbers | constants | tabled

    def _tiles(self, x: Tensor) -> TensorDescriptor:
        return descriptor(x, self.plan.config.C, self.plan.packed)

    def forward(self, v: Tensor, initial: Tensor | None, o: Tensor, final: Tensor | None) -> Tensor:
        """Fill o [B, T, H, V] and final, and return the states [NC, H, K, V]. It also counts the bands.

        Args:
            v: [B, T, H, V].
            initial: [segments, H, K, V] fp32, states before the segments. None means zeros.
            o: [B, T, H, V], output. It is correct except in chunks beyond the limit.
            final: [segments, H, K, V] fp32, output: the states after the segments, unless None.
        """
        plan = self.plan
        states = v.new_empty((plan.chunks.NC, plan.H, plan.K, plan.V))
        tensors, others = self._shared()
        hopper_forward_kernel[(plan.segments.count * plan.H,)](
            *(self._tiles(self.q), self._tiles(self.f), self._tiles(v), state_descriptor(states), self._tiles(o)),
            *(self.bound, *(self.none if x is None else x for x in (initial, final)), self.bands),
            *tensors,
            **others,
            HAS_INITIAL=initial is not None,
            FINAL=final is not None,
            REGS=FORWARD_REGS,
            num_warps=8,
        )
        return states

    def backward(
        self,
        v: Tensor,
        do: Tensor,
        states: Tensor,
        initial: Tensor | None,
        dq: Tensor,
        df: Tensor,
        dv: Tensor,
        final: Tensor | None,
    ) -> Tensor | None:
        """Fill dq, df, dv and final, and return the gradient of the bound [H, K], or None without a bound.

        Args:
            v, do: [B, T, H, V].
            states: the states of the forward.
            initial: [segments, H, K, V] fp32, gradients of the states after the segments. None means zeros.
            final: [segments, H, K, V] fp32, output: the gradients of the states before the segments, unless None.
        """
        plan = self.plan
        # only the entries of chunks beyond the limit are written; the memory of the other chunks is not touched
        dstates = torch.empty_like(states)
        parts = self._bound_parts()
        tensors, others = self._shared()
        hopper_backward_kernel[(plan.segments.count * plan.H,)](
            *(self._tiles(x) for x in (self.q, self.f, v, do)),
            *(state_descriptor(states), state_descriptor(dstates)),
            *(self._tiles(x) for x in (dv, dq, df)),
            *(self.bound, *(self.none if x is None else x for x in (initial, final)), self.bands, parts),
            *tensors,
            **others,
            NC=plan.numbers["NC"],
            parts=plan.chunks.NC,
            HAS_INITIAL=initial is not None,
            FINAL=final is not None,
            REGS=BACKWARD_REGS,
            num_warps=8,
        )
        self.output(do, dstates, dv, reverse=True)
        return self.gradients(v, do, states, dstates, dq, df, parts)

    def _bound_parts(self) -> Tensor:
        """Return zeros [H, K, chunks + segments] fp32 for the bound's gradient: a part per chunk, then per segment."""
        plan = self.plan
        return self.bound.new_zeros((plan.H, plan.K, plan.numbers["NC"])) if plan.bounded else self.none

    def gradients(self, v, do, states, dstates, dq, df, parts: Tensor | None = None) -> Tensor | None:
        """Fill dq and df of the chunks beyond the limit. `parts` holds the parts of the bound's gradient so far."""
        plan = self.plan
        parts = self._bound_parts() if parts is None else parts
        launch = _chunk_gradient(plan, v.stride(), do.stride(), dq.stride(), df.stride())
        launch(
            *(self.q, self.f, v, do, self.bound, states, dstates, self.bands, dq, df, parts, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first),
        )
        return parts.sum(-1) if plan.bounded else None
