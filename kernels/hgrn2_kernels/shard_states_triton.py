"""The function `shard_states` on a GPU: a walk over chunks that stores no states, and the backward of the operator."""

import torch
import torch.nn.functional as F

from hgrn2_kernels.chunk_triton import Launches
from hgrn2_kernels.dispatch import chunk_backward
from hgrn2_kernels.gate import log_forget_backward
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.strides import unit_stride


def forward(f, v, lower_bound, cu_seqlens):
    """Return the state and the log decay. Arguments and results are as in `shard_states`."""
    f, v = unit_stride(f), unit_stride(v)
    with torch.cuda.device_of(f):
        # the queries are not read
        state, log_decay, _ = Launches(f, f, v, lower_bound, 1.0, cu_seqlens).totals(v)
    return state, log_decay


def backward(dstate, dlog_decay, f, v, lower_bound, cu_seqlens):
    """Return the gradients of f, v and lower_bound. The last one is None without a bound."""
    # the part through the state: the backward of the operator with a gradient of the final state and none of o
    inputs = Inputs(f, f, v, lower_bound, None, cu_seqlens, 1.0)
    _, df, dv, dbound, _ = chunk_backward(torch.zeros_like(v), dstate, inputs)
    # the part through the log decay, which is a sum over the gates of the sequence
    f, dg = f.float(), dlog_decay[:, None]
    if cu_seqlens is not None:
        T = f.shape[1]
        # tokens after the last boundary are in no sequence, and may hold anything
        ends, dg = F.pad(cu_seqlens, (0, 1), value=T), F.pad(dlog_decay, (0, 0, 0, 0, 0, 1))
        dg = dg.repeat_interleave(ends.diff(), 0, output_size=T)[None]
        f = f.masked_fill((torch.arange(T, device=f.device) >= cu_seqlens[-1])[:, None, None], 0.0)
    df_decay, dbound_decay = log_forget_backward(f, lower_bound, dg, 0.0)
    if dbound is not None:
        dbound += dbound_decay.sum((0, 1))
    return df.add_(df_decay), dv, dbound
