"""The operator on Hopper: a forward and a backward with one pass each over the chunks.

The forward launches hopper_forward_kernel, which also counts the bands of each chunk, and the backward launches
hopper_backward_kernel. The launches of beyond_triton.py follow each of them, for the chunks beyond the fast limit: only
the device knows which chunks these are. Where sequences are cut into segments, chunk_state runs first and finds the
states that enter the segments.

`chunk_forward` and `chunk_backward` have the arguments and results of those in chunk_triton.py. dispatch.py chooses
between the two modules.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hgrn2_kernels.beyond_triton import BeyondLaunches
from hgrn2_kernels.chunk_plan import Chunks, Plan, Segments, keeps_entering
from hgrn2_kernels.chunk_triton import CACHED_LAUNCHES
from hgrn2_kernels.hopper_backward import hopper_backward_kernel
from hgrn2_kernels.hopper_forward import hopper_forward_kernel
from hgrn2_kernels.hopper_tiles import D, descriptors
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.launch import Launch
from hgrn2_kernels.strides import REACH, dense_like

# the number of programs that an H100 runs at a time, one on each multiprocessor
PROGRAMS = 132
# the count of bands of a chunk within the fast limit
WITHIN = 1
# registers of a thread that makes operands, forward and backward; the warps of the products get the rest
FORWARD_REGS, BACKWARD_REGS = 104, 104


def chunk_forward(inputs: Inputs, output_final_state=True, save_states=False):
    """Run the forward; see chunk_triton.chunk_forward.

    The saved counts of bands are int32. With save_states, the lists of chunks beyond the limit are saved too.
    """
    q, f, v = readable(*inputs[:3])
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        o = dense_like(inputs.v)
        states, final, entering = run.run_forward(
            v, inputs.initial_state, o, output_final_state, save_lists=save_states
        )
    final = final if output_final_state else None
    if save_states:
        return o, final, (states, run.bands, run.chunks, run.blocks)
    return o, final, (entering,) if run.plan.keeps_entering else ()


def chunk_backward(do, dfinal_state, inputs: Inputs, saved=(), into=None):
    """Run the backward; see chunk_triton.chunk_backward."""
    wanted = [dense_like(x) for x in inputs[:3]] if into is None else into
    q, f, v, dq, df, dv, do = tensors = *inputs[:3], *wanted, do
    if not movable(*tensors):
        q, f, v, do = readable(q, f, v, do)
        # if TMA cannot write the layout of an output, the kernel writes a copy, which is copied back below
        contiguous = torch.contiguous_format
        dq, df, dv = (x if movable(x) else torch.empty_like(x, memory_format=contiguous) for x in wanted)
    # traced code saves no lists
    states, bands, *listed = saved if len(saved) > 1 else (None, None)
    wants_final = inputs.initial_state is not None
    with torch.cuda.device_of(q):
        run = HopperLaunches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens, bands, listed)
        if states is None:
            entering = saved[0] if saved else None
            states, *_ = run.states(v, inputs.initial_state, wants_final=False, entering=entering)
        dbound, dinitial = run.run_backward(v, do, states, dfinal_state, dq, df, dv, wants_final)
    for x, y in zip(wanted, (dq, df, dv), strict=True):
        if x is not y:
            x.copy_(y)
    return dq, df, dv, dbound, dinitial if wants_final else None


def movable(*tensors: Tensor) -> bool:
    """Return whether the kernels can read and write all of these tensors [B, T, H, D], which share shape and dtype.

    TMA needs rows of D numbers, at addresses in steps of 16 bytes. The kernels of chunk_triton.py, which also run here,
    need the tokens of a chunk in reach.
    """
    aligned = math.gcd(16, *map(Tensor.data_ptr, tensors)) == 16
    x = tensors[0]
    return aligned and _movable(x.shape, x.element_size(), *map(Tensor.stride, tensors))


@functools.lru_cache(maxsize=1024)
def _movable(shape, itemsize, *strides_of_all):
    return all(_are_movable(shape, itemsize, strides) for strides in strides_of_all)


def _are_movable(shape, itemsize, strides):
    steps = [stride for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size > 1]
    aligned = all(step * itemsize % 16 == 0 for step in steps)
    return aligned and strides[-1] == 1 and strides[1] < REACH and min(steps, default=1) > 0


def readable(*tensors: Tensor) -> Sequence[Tensor]:
    """Return the tensors, where those that the kernels cannot read are replaced by contiguous copies."""
    return tensors if movable(*tensors) else [by_tma(x) for x in tensors]


def by_tma(x: Tensor) -> Tensor:
    """Return x, or a contiguous copy if the kernels cannot read x."""
    return x if movable(x) else x.clone(memory_format=torch.contiguous_format)


def cut(chunks: Chunks, C: int, H: int) -> Segments:
    """Cut sequences into segments of at least 8 chunks, such that the fewest multiprocessors are idle.

    A kernel here takes as long as its slowest multiprocessor. Two segments per sequence save half of that time, which
    is more than the additional pass over the segments costs.
    """
    return Segments.of(chunks, C, PROGRAMS // (chunks.N * H), least=2)


@functools.lru_cache(maxsize=1024)
def _plan(plan: Plan) -> Plan:
    """Return the plan of the kernels here, made from the plan of chunk_triton.py."""
    chunks = plan.chunks
    segments = cut(chunks, plan.config.C, plan.H)
    tokens = chunks.T if plan.packed else chunks.T * chunks.N
    return dataclasses.replace(
        plan,
        segments=segments,
        keeps_entering=keeps_entering(segments, tokens, plan.K, plan.V, itemsize=2),
        # the gradient of the bound has more parts here, see _backward
        numbers=plan.numbers | {"NC": chunks.NC + segments.count},
    )


class HopperLaunches(BeyondLaunches):
    """The launches over one set of inputs. It inherits the launches of chunk_state and those beyond the limit."""

    readable = staticmethod(readable)
    _plan = staticmethod(_plan)

    def __init__(self, q, f, v, lower_bound, scale, cu_seqlens, bands=None, listed=()):
        """Take the inputs, and from an earlier pass the counts of bands and the lists (chunks, blocks)."""
        self.listed = listed
        super().__init__(q, f, v, lower_bound, scale, cu_seqlens, bands)
        if bands is None and self.plan.packed:
            # chunks after the last sequence have 0 bands, as in Launches
            self.bands.masked_fill_((self.chunk_sequence == self.plan.chunks.N)[:, None, None], 0)

    def _new_bands(self, like: Tensor) -> Tensor:
        plan = self.plan
        return like.new_full((plan.chunks.NC, plan.H, plan.blocks), WITHIN, dtype=torch.int32)

    def run_forward(self, v, initial, o, wants_final=True, rows=None, totals=None, save_lists=False):
        """Fill o, and return the states [NC, H, K, V], the final states and the entering ones, as `Launches` does."""
        initial, final, entering, rows = self._ends(v, initial, wants_final, rows, totals, False)
        states = self.forward(v, initial, o, None if self.plan.segments.cut else final, rows)
        self.lists(gradients=save_lists)
        self.output(v, states, o)
        return states, final, entering

    def run_backward(self, v, do, states, dfinal, dq, df, dv, wants_final=True, rows=None, totals=None):
        """Fill dq, df and dv, and return the gradients of the bound and of the initial states, as `Launches` does."""
        dfinal, dinitial, _, rows = self._ends(do, dfinal, wants_final, rows, totals, True)
        # only the entries of chunks beyond the limit are written; the memory of the other chunks is not touched
        dstates = torch.empty_like(states)
        last = None if self.plan.segments.cut else dinitial
        parts = self.backward(v, do, states, dfinal, dstates, dq, df, dv, last, rows)
        if self.listed:
            self.chunks, self.blocks = self.listed
        else:
            self.lists(gradients=True)
        self.output(do, dstates, dv, reverse=True)
        return self.gradients(v, do, states, dstates, dq, df, parts), dinitial

    def _ends(self, y, initial, wants_final, rows, totals, reverse):
        """Find the states at the beginnings of the segments, where sequences are cut, and make room for final states.

        Returns:
            initial: [segments, H, K, V] fp32, or None.
            final: [N, H, K, V] fp32, or None without wants_final. Where sequences are whole, the kernel fills it.
            entering: initial where sequences are cut, and else None.
            rows: the rows of initial, or None.
        """
        initial = None if initial is None else initial.contiguous()
        if not self.plan.segments.cut:
            return initial, self._per_segment(y, D) if wants_final else None, None, rows
        entering, final = self._enter(y, initial, rows, totals, reverse, wants_final)
        return entering, final, entering, None

    def forward(self, v: Tensor, initial=None, o=None, final=None, rows=None) -> Tensor:
        """Fill o [B, T, H, V] and final, and return the states [NC, H, K, V]. It also counts the bands.

        Args:
            v: [B, T, H, V].
            initial: [segments, H, K, V] fp32, states before the segments. None means zeros.
            o: [B, T, H, V], output. It is correct except in chunks beyond the limit.
            final: [segments, H, K, V] fp32, output: the states after the segments, unless None.
            rows: [segments] int32, the row of initial that each segment takes, -1 for zeros. None means its own row.
        """
        plan = self.plan
        states = v.new_empty(plan.chunks.NC, plan.H, plan.K, plan.V)
        _forward(plan, initial is not None, rows is not None, final is not None)(
            *(self.bound, *self._filled(initial, rows, final), self.bands, *self.of_segments),
            descriptors=descriptors((self.q, self.f, v), (states,), (o,), plan.config.C, plan.packed),
        )
        return states

    def backward(self, v, do, states, initial, dstates, dq, df, dv, final=None, rows=None) -> Tensor:
        """Fill dq, df, dv and final, and return parts of the gradient of the bound for `gradients`.

        Args:
            v, do: [B, T, H, V].
            states: [NC, H, K, V] bf16, the states of the forward.
            initial: [segments, H, K, V] fp32, gradients of the states after the segments. None means zeros.
            dstates: [NC, H, K, V] bf16, output: gradients of the states after chunks beyond the limit.
            dq, df, dv: [B, T, H, D], output. They are correct except in chunks beyond the limit.
            final: [segments, H, K, V] fp32, output: the gradients of the states before the segments, unless None.
            rows: [segments] int32, the row of initial that each segment takes, -1 for zeros. None means its own row.
        """
        parts = self.bound_parts()
        _backward(self.plan, initial is not None, rows is not None, final is not None)(
            *(self.bound, *self._filled(initial, rows, final), self.bands, parts, *self.of_segments),
            descriptors=descriptors(
                *((self.q, self.f, v, do), (states, dstates), (dv, dq, df), self.plan.config.C, self.plan.packed)
            ),
        )
        return parts


def _common(plan: Plan) -> dict:
    segments = plan.segments
    tabled = dict(SEGMENTS=segments.per_sequence, LENGTH=segments.length, TABLED=segments.tabled)
    return plan.numbers | tabled


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _forward(plan: Plan, has_initial: bool, rows: bool, final: bool) -> Launch:
    flags = dict(HAS_INITIAL=has_initial, ROWS=rows, FINAL=final, REGS=FORWARD_REGS)
    return Launch(hopper_forward_kernel, (plan.segments.count * plan.H,), 8, **_common(plan), **flags)


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _backward(plan: Plan, has_initial: bool, rows: bool, final: bool) -> Launch:
    # the parts of the segments follow those of the chunks
    flags = dict(HAS_INITIAL=has_initial, ROWS=rows, FINAL=final, REGS=BACKWARD_REGS, parts=plan.chunks.NC)
    return Launch(hopper_backward_kernel, (plan.segments.count * plan.H,), 8, **_common(plan), **flags)
