"""`segment_states` on a GPU: the walk over chunks that stores no states, and the operator's own backward."""

import torch
from torch.autograd.function import once_differentiable

from hgrn2_kernels.chunk_triton import Launches, chunk_backward
from hgrn2_kernels.gate import log_forget_backward
from hgrn2_kernels.strides import unit_stride


class SegmentStates(torch.autograd.Function):
    """Saves its inputs alone."""

    @staticmethod
    def forward(ctx, f, v, lower_bound, cu_seqlens):
        """Arguments as in `segment_states`, and what it returns."""
        ctx.save_for_backward(f, v, lower_bound, cu_seqlens)
        f, v = unit_stride(f), unit_stride(v)
        with torch.cuda.device_of(f):
            # the queries are not read
            state, log_decay, _ = Launches(f, f, v, lower_bound, 1.0, cu_seqlens).totals(v)
        return state, log_decay

    @staticmethod
    @once_differentiable
    def backward(ctx, dstate, dlog_decay):
        f, v, lower_bound, cu_seqlens = ctx.saved_tensors
        # what the final state asks of the tokens, where no output asks anything
        _, df, dv, dbound, _ = chunk_backward(
            torch.zeros_like(v), dstate, f, f, v, lower_bound, None, cu_seqlens, scale=1.0
        )
        # the decay of a sequence holds the gate of each of its tokens
        if cu_seqlens is None:
            dg = dlog_decay[:, None]
        else:
            dg = dlog_decay.repeat_interleave(cu_seqlens.diff(), 0, output_size=f.shape[1])[None]
        df_decay, dbound_decay = log_forget_backward(f.float(), lower_bound, dg, 0.0)
        if dbound is not None:
            dbound += dbound_decay.sum((0, 1))
        return df.add_(df_decay), dv, dbound, None
