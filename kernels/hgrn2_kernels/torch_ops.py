"""The operators of this package in torch.library: their schemas, gradients and fake versions.

A registered operator is one node for autograd and torch.compile, and nothing inside it is traced. The PyTorch form is
registered for that reason too. If PyTorch 2.11 traces an autograd.Function in which one tensor is an output and also
used inside, as `contiguous` and `to` may return their input, that output silently loses its gradient.

The results of an operator may not be None. A tensor without elements stands for a result that does not exist.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from hgrn2_kernels import chunkwise
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.once import OPERATORS, once_differentiable
from hgrn2_kernels.strides import dense_like

_library = torch.library.Library("hgrn2", "DEF")


def define(schema: str, run: Callable, fake: Callable) -> None:
    """Register an operator hgrn2::name.

    Args:
        schema: its name, arguments and results, in the syntax of torch.library.
        run: the function that computes it, on any device.
        fake: the function that returns empty results of the same shapes, dtypes and strides, for fake tensors.
    """
    _library.define(schema)
    name = schema.partition("(")[0]
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hgrn2::{name}", fake, lib=_library)


def differentiate(name: str, backward: Callable, setup_context: Callable) -> None:
    """Register the backward of hgrn2::name, and make the operator hgrn2::name_backward refuse to be differentiated.

    Args:
        backward, setup_context: arguments of torch.library.register_autograd.
    """
    torch.library.register_autograd(f"hgrn2::{name}", backward, setup_context=setup_context, lib=_library)
    torch.library.register_autograd(f"hgrn2::{name}_backward", _refuse, lib=_library)


def _refuse(ctx, *gradients):
    raise NotImplementedError(OPERATORS)


def or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    """Return x, or a tensor without elements if x is None."""
    return like.new_empty(0, dtype=torch.float32) if x is None else x


@functools.cache
def _kernels():
    # a CPU needs no triton
    from hgrn2_kernels import chunk_plan, dispatch

    return dispatch, chunk_plan


def _chunk(q, f, v, lower_bound, initial_state, cu_seqlens, scale, save_states, kernels):
    inputs = Inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    # the states that enter the segments are not kept here: their shape would tie traced code to one length
    nothing = q.new_empty(0), q.new_empty(0, dtype=torch.int8)
    if not kernels:
        return *chunkwise.forward(inputs), *nothing
    o, final_state, saved = _kernels()[0].chunk_forward(inputs, save_states=save_states)
    return o, final_state, *(saved[:2] if save_states else nothing)


def _chunk_backward(do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, states, bands, scale, kernels):
    inputs = Inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    if kernels:
        saved = (states, bands) if states.numel() else ()
        dq, df, dv, dbound, dinitial = _kernels()[0].chunk_backward(do, dfinal_state, inputs, saved)
    else:
        dq, df, dv, dbound, dinitial = chunkwise.backward(do, dfinal_state, inputs)
    return dq, df, dv, or_empty(dbound, q), or_empty(dinitial, q)


def _chunk_fake(q, f, v, lower_bound, initial_state, cu_seqlens, scale, save_states, kernels):
    H, K, V = q.shape[2], q.shape[3], v.shape[3]
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    states, bands, states_dtype, bands_dtype = [0], [0], q.dtype, torch.int8
    if kernels and save_states:
        dispatch, plan = _kernels()
        config = plan.Config.of(q.dtype, K, V)
        NC = plan.Chunks.of(q.shape[0], q.shape[1], None if cu_seqlens is None else N, config.C).NC
        states, bands, states_dtype = [NC, H, K, V], [NC, H, config.blocks(K)], config.dtype
        bands_dtype = torch.int32 if dispatch.by_hopper(q, v) else torch.int8
    return (
        _like(v, kernels),
        v.new_empty((N, H, K, V), dtype=dtype),
        v.new_empty(states, dtype=states_dtype),
        v.new_empty(bands, dtype=bands_dtype),
    )


def _chunk_backward_fake(
    do, dfinal_state, q, f, v, lower_bound, initial_state, cu_seqlens, states, bands, scale, kernels
):
    small = (or_empty(None if x is None else x.new_empty(x.shape), q) for x in (lower_bound, initial_state))
    return *(_like(x, kernels) for x in (q, f, v)), *small


def _like(x, kernels):
    return dense_like(x) if kernels else x.new_empty(x.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _, ctx.kernels = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _backward(ctx, do, dfinal_state, _states, _bands):
    *tensors, states, bands = ctx.saved_tensors
    _, _, _, lower_bound, initial_state, _ = tensors
    dq, df, dv, dbound, dinitial = torch.ops.hgrn2.chunk_backward(
        do, dfinal_state, *tensors, states, bands, ctx.scale, ctx.kernels
    )
    dbound = None if lower_bound is None else dbound
    dinitial = None if initial_state is None else dinitial
    return dq, df, dv, dbound, dinitial, None, None, None, None


define(
    "chunk(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor? initial_state, Tensor? cu_seqlens, float scale,"
    " bool save_states, bool kernels) -> (Tensor o, Tensor final_state, Tensor states, Tensor bands)",
    _chunk,
    _chunk_fake,
)
define(
    "chunk_backward(Tensor do, Tensor dfinal_state, Tensor q, Tensor f, Tensor v, Tensor? lower_bound,"
    " Tensor? initial_state, Tensor? cu_seqlens, Tensor states, Tensor bands, float scale, bool kernels)"
    " -> (Tensor dq, Tensor df, Tensor dv, Tensor dlower_bound, Tensor dinitial_state)",
    _chunk_backward,
    _chunk_backward_fake,
)
differentiate("chunk", _backward, _setup_context)


class Chunk(torch.autograd.Function):
    """The operator `hgrn2::chunk` by the kernels, for eager tensors.

    It reaches the kernels in half the time that the dispatcher of torch.library takes. It takes q, f and v as three
    tensors or as one, and returns their gradients in the same way.
    """

    @staticmethod
    def forward(ctx, scale, output_final_state, save_states, lower_bound, initial_state, cu_seqlens, *qfv):
        """Return o and the final state or None. qfv is (q, f, v), or one tensor [B, T, H, 3, K] that holds them."""
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        others = lower_bound, initial_state, cu_seqlens
        inputs = Inputs(*_apart(qfv), *others, scale)
        o, final_state, saved = _kernels()[0].chunk_forward(inputs, output_final_state, save_states)
        ctx.save_for_backward(*qfv, *others, *saved)
        ctx.count = len(qfv)
        return o, final_state

    @staticmethod
    @once_differentiable(OPERATORS)
    def backward(ctx, saved, do, dfinal_state):
        qfv, others, saved = saved[: ctx.count], saved[ctx.count : ctx.count + 3], saved[ctx.count + 3 :]
        inputs = Inputs(*_apart(qfv), *others, ctx.scale)
        dqfv = tuple(dense_like(x) for x in qfv)
        do = torch.zeros_like(inputs.v) if do is None else do
        *_, dbound, dinitial = _kernels()[0].chunk_backward(do, dfinal_state, inputs, saved, into=_apart(dqfv))
        return None, None, None, dbound, dinitial, None, *dqfv


def _apart(qfv):
    return qfv[0].unbind(-2) if len(qfv) == 1 else qfv


def is_eager(x: Tensor) -> bool:
    """Return whether x is an ordinary tensor, and nothing traces or transforms (torch.func) the call."""
    ordinary = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    return ordinary and peek_interpreter_stack() is None


def chunk(inputs: Inputs, output_final_state, save_states=False, kernels=True):
    """Return o and the final state or None, computed by the kernels or in PyTorch; see `chunk_hgrn2`."""
    q, f, v, *others, scale = inputs
    if kernels and is_eager(q):
        return Chunk.apply(scale, output_final_state, save_states, *others, q, f, v)
    o, final_state, *_ = torch.ops.hgrn2.chunk(*inputs, save_states, kernels)
    return o, final_state if output_final_state else None


def chunk_fused(qfv, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states):
    """Run `chunk` by the kernels on one projection [B, T, H, 3, K].

    For an eager tensor its gradient is written directly. Traced code splits the projection and uses `chunk`.
    """
    if is_eager(qfv):
        return Chunk.apply(scale, output_final_state, save_states, lower_bound, initial_state, cu_seqlens, qfv)
    inputs = Inputs(*qfv.unbind(-2), lower_bound, initial_state, cu_seqlens, scale)
    return chunk(inputs, output_final_state, save_states)
