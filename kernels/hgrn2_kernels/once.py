"""Backward passes that run once: a second derivative through one of them raises an error.

Such a backward computes without a graph, so autograd would treat its gradients as constants. A gradient penalty, for
example, would be wrong without any message. PyTorch's own `once_differentiable` notices that only if the incoming
gradient requires a gradient, and the gradient of a plain sum does not.
"""

import functools
from collections.abc import Callable

import torch
from torch._C._functorch import is_batchedtensor, is_legacy_batchedtensor

BATCHED = "this backward takes no batched gradients (is_grads_batched, vmap): compute the gradients one after the other"
OPERATORS = (
    "the HGRN2 operators have no second derivatives: leave create_graph out, or use recurrent_hgrn2, the recurrence "
    "token by token, which can be differentiated any number of times"
)


def once_differentiable(instead: str) -> Callable:
    """Decorate the backward of an autograd.Function, backward(ctx, saved, *gradients), that runs without a graph.

    With create_graph, its results raise an error as soon as they are differentiated, whether with respect to a tensor
    that the forward saved or to an incoming gradient.

    Args:
        instead: the error message. It says what does not exist and what to do instead.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, *gradients):
            # read once: activation checkpointing recomputes the tensors at the first read, and refuses a second one
            saved = ctx.saved_tensors
            if any(x is not None and (is_batchedtensor(x) or is_legacy_batchedtensor(x)) for x in gradients):
                raise NotImplementedError(BATCHED)
            if not torch.is_grad_enabled():
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            # The results must depend on every tensor with respect to which they may be differentiated. Otherwise
            # autograd would report such a tensor as unused.
            sources = [x for x in (*saved, *gradients) if x is not None]
            made = [x for x in results if x is not None]
            refusing = iter(_Refusal.apply(instead, len(made), *made, *sources))
            return tuple(x if x is None else next(refusing) for x in results)

        return once

    return decorate


class _Refusal(torch.autograd.Function):
    """The identity on its first `count` tensors. Its backward raises a NotImplementedError."""

    @staticmethod
    def forward(ctx, instead, count, *tensors):
        ctx.instead = instead
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(ctx.instead)
