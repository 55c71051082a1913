"""The launches over chunks beyond the fast limit, which follow a kernel that has computed all other chunks."""

import functools

import torch
from torch import Tensor

from hgrn2_kernels.chunk_beyond import beyond_gradient_kernel, beyond_list_kernel, beyond_output_kernel
from hgrn2_kernels.chunk_plan import Plan, strides
from hgrn2_kernels.chunk_triton import CACHED_LAUNCHES, Launches
from hgrn2_kernels.launch import Launch

# programs of a kernel that goes through a list: two on each multiprocessor of an H100
PROGRAMS = 264
# items of a program that writes a list
PART = 2048


class BeyondLaunches(Launches):
    """Launches whose `output` and `gradients` compute only the chunks beyond the fast limit.

    The other chunks keep what the tensors hold, except that tokens after the last packed sequence get zeros.
    """

    def lists(self, gradients: bool) -> None:
        """List the items of `output`, and with `gradients` also those of `gradients`. The counts must be known."""
        plan = self.plan
        n_chunks, n_blocks = plan.output_programs, plan.gradient_programs
        new = functools.partial(self.bands.new_empty, dtype=torch.int32)
        self.chunks = new(1 + n_chunks)
        self.blocks = new(1 + n_blocks) if gradients else self.chunks
        _list(plan, gradients)(self.bands, self.chunks, self.blocks)

    def output(self, y: Tensor, states: Tensor, out: Tensor, reverse: bool = False):
        """Fill out as `Launches.output` does."""
        launch = _output(self.plan, y.stride(), out.stride(), reverse)
        launch(
            *(self.q, self.f, y, self.bound, states, self.bands, out, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first, self.chunks),
        )

    def gradients(self, v: Tensor, do: Tensor, states: Tensor, dstates: Tensor, dq: Tensor, df: Tensor, parts=None):
        """Fill dq and df as `Launches.gradients` does, and return the gradient of the bound [H, K], or None.

        Args:
            parts: [H, K, NC] fp32, parts of the gradient of the bound, to which the chunks beyond the limit add their
                own at the index of the chunk. NC is the number in the plan. None means zeros.
        """
        plan = self.plan
        parts = self.bound_parts() if parts is None else parts
        launch = _gradient(plan, v.stride(), do.stride(), dq.stride(), df.stride())
        launch(
            *(self.q, self.f, v, do, self.bound, states, dstates, self.bands, dq, df, parts, self.sums, self.ones),
            *(self.cu_seqlens, self.chunk_sequence, self.chunk_first, self.blocks),
        )
        return parts.sum(-1) if plan.bounded else None

    def bound_parts(self) -> Tensor:
        """Return zeros [H, K, NC] fp32, or a tensor that stands for none where there is no bound."""
        plan = self.plan
        return self.bound.new_zeros(plan.H, plan.K, plan.numbers["NC"]) if plan.bounded else self.none


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _list(plan: Plan, gradients: bool) -> Launch:
    items = plan.gradient_programs if gradients else plan.output_programs
    return Launch(
        beyond_list_kernel,
        (-(-items // PART), 1 + gradients),
        8,
        n_chunks=plan.output_programs,
        K=plan.K,
        BK=plan.config.gradient[0],
        BF=plan.config.BK,
        SIZE=PART,
    )


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _output(plan: Plan, stride_y, stride_o, reverse: bool) -> Launch:
    config = plan.config
    return Launch(
        beyond_output_kernel,
        (min(PROGRAMS, plan.output_programs),),
        config.output_warps,
        **plan.numbers,
        **strides("y", stride_y),
        **strides("o", stride_o),
        BK=config.BK,
        BV=config.BV,
        REVERSE=reverse,
        STAGES=1,
    )


@functools.lru_cache(maxsize=CACHED_LAUNCHES)
def _gradient(plan: Plan, stride_v, stride_do, stride_dq, stride_df) -> Launch:
    BK, warps = plan.config.gradient
    return Launch(
        beyond_gradient_kernel,
        (min(PROGRAMS, plan.gradient_programs),),
        warps,
        **plan.numbers,
        **strides("v", stride_v),
        **strides("do", stride_do),
        **strides("dq", stride_dq),
        **strides("df", stride_df),
        BK=BK,
        BF=plan.config.BK,
        BV=plan.config.BV,
        AHEAD=0,
    )
