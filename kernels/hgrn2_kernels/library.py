"""The Triton form of the operator in torch.library: what autograd, torch.compile and fake tensors know of it.

An optional tensor that is not there is one without elements, because an operator's results may not be None.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgrn2_kernels.chunk_plan import Chunks, Config
from hgrn2_kernels.chunk_triton import chunk_backward, chunk_forward
from hgrn2_kernels.strides import dense_like

_library = torch.library.Library("hgrn2", "DEF")
_library.define(
    "chunk(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor? initial_state, Tensor? cu_seqlens, float scale,"
    " bool save_states) -> (Tensor o, Tensor final_state, Tensor states, Tensor bands)"
)
_library.define(
    "chunk_backward(Tensor do, Tensor dfinal_state, Tensor q, Tensor f, Tensor v, Tensor? lower_bound,"
    " Tensor? initial_state, Tensor? cu_seqlens, Tensor states, Tensor bands, float scale)"
    " -> (Tensor dq, Tensor df, Tensor dv, Tensor dlower_bound, Tensor dinitial_state)"
)


def _chunk(q, f, v, lower_bound, initial_state, cu_seqlens, scale, save_states):
    inputs = q, f, v, lower_bound, initial_state, cu_seqlens
    o, final_state, saved = chunk_forward(*inputs, scale, save_states=save_states)
    # what enters the segments is not kept: its shape would tie traced code to one length
    states, bands = saved if save_states else (o.new_empty(0), o.new_empty(0, dtype=torch.int8))
    return o, final_state, states, bands


def _chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, states, bands, scale):
    saved = (states, bands) if states.numel() else ()
    dq, df, dv, dbound, dinitial = chunk_backward(
        do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, scale, saved
    )
    return dq, df, dv, _or_empty(dbound, q), _or_empty(dinitial, q)


def _or_empty(x, like):
    return like.new_empty(0, dtype=torch.float32) if x is None else x


for _name, _function in (("chunk", _chunk), ("chunk_backward", _chunk_backward)):
    # the CPU's is Triton's interpreter
    _library.impl(_name, _function, "CUDA")
    _library.impl(_name, _function, "CPU")


@torch.library.register_fake("hgrn2::chunk", lib=_library)
def _chunk_fake(q, f, v, lower_bound, initial_state, cu_seqlens, scale, save_states):
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = Config.of(q.dtype, K, V)
    final_state = v.new_empty((N, H, K, V), dtype=torch.float32)
    states, bands = [0], [0]
    if save_states:
        NC = Chunks.of(q.shape[0], q.shape[1], None if cu_seqlens is None else N, config.C).NC
        states, bands = [NC, H, K, V], [NC, H, config.blocks(K)]
    return (
        dense_like(v),
        final_state,
        v.new_empty(states, dtype=config.dtype),
        v.new_empty(bands, dtype=torch.int8),
    )


@torch.library.register_fake("hgrn2::chunk_backward", lib=_library)
def _chunk_backward_fake(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, states, bands, scale):
    dbound = _or_empty(None if lower_bound is None else torch.empty_like(lower_bound), q)
    dinitial = _or_empty(None if initial_state is None else initial_state.new_empty(initial_state.shape), q)
    return dense_like(q), dense_like(f), dense_like(v), dbound, dinitial


class Chunk(torch.autograd.Function):
    """`hgrn2::chunk` for eager tensors, which reach it in half the time that the dispatcher takes.

    It takes q, f and v in one tensor or apart, and gives their gradients likewise.
    """

    @staticmethod
    def forward(ctx, scale, output_final_state, save_states, lower_bound, initial_state, cu_seqlens, *qfv):
        """Returns o and the final state or None, of q, f and v or of one [B, T, H, 3, K] that holds them."""
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        others = lower_bound, initial_state, cu_seqlens
        o, final_state, saved = chunk_forward(*_apart(qfv), *others, scale, output_final_state, save_states)
        ctx.save_for_backward(*qfv, *others, *saved)
        ctx.count = len(qfv)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dfinal_state):
        # read once: activation checkpointing recomputes at the first reading and refuses a second
        saved = ctx.saved_tensors
        qfv, others, saved = saved[: ctx.count], saved[ctx.count : ctx.count + 3], saved[ctx.count + 3 :]
        q, f, v = _apart(qfv)
        dqfv = tuple(dense_like(x) for x in qfv)
        do = torch.zeros_like(v) if do is None else do
        *_, dbound, dinitial = chunk_backward(
            do, dfinal_state, q, f, v, *others, ctx.scale, saved=saved, into=_apart(dqfv)
        )
        return None, None, None, dbound, dinitial, None, *dqfv


def _apart(qfv):
    return qfv[0].unbind(-2) if len(qfv) == 1 else qfv


def _is_eager(x):
    return type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()


def chunk(q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states):
    """o and the final state or None, by the kernels; see `chunk_hgrn2`."""
    if _is_eager(q):
        return Chunk.apply(scale, output_final_state, save_states, lower_bound, initial_state, cu_seqlens, q, f, v)
    o, final_state, *_ = torch.ops.hgrn2.chunk(q, f, v, lower_bound, initial_state, cu_seqlens, scale, save_states)
    return o, final_state if output_final_state else None


def chunk_fused(qfv, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states):
    """`chunk` of one projection [B, T, H, 3, K], whose gradient comes in one piece; traced, by way of three."""
    if _is_eager(qfv):
        return Chunk.apply(scale, output_final_state, save_states, lower_bound, initial_state, cu_seqlens, qfv)
    return chunk(*qfv.unbind(-2), lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states)


def _setup_context(ctx, inputs, output):
    *tensors, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.scale = scale


def _backward(ctx, do, dfinal_state, _states, _bands):
    *tensors, states, bands = ctx.saved_tensors
    _, _, _, lower_bound, initial_state, _ = tensors
    dq, df, dv, dbound, dinitial = torch.ops.hgrn2.chunk_backward(do, dfinal_state, *tensors, states, bands, ctx.scale)
    dbound = None if lower_bound is None else dbound
    dinitial = None if initial_state is None else dinitial
    return dq, df, dv, dbound, dinitial, None, None, None


torch.library.register_autograd("hgrn2::chunk", _backward, setup_context=_setup_context, lib=_library)
