"""Backward passes that can be run but not differentiated: a second derivative through one raises an error.

Such a backward computes without a graph, so that autograd takes its gradients for constants: whatever is made of them,
a gradient penalty for one, is silently wrong. PyTorch's own `once_differentiable` notices only where the gradient that
comes in requires one, which that of a plain sum does not.
"""

import functools
from collections.abc import Callable

import torch

OPERATORS = (
    "the HGRN2 operators have no second derivatives: leave create_graph out, or differentiate recurrent_hgrn2, the "
    "recurrence token by token, as often as you like"
)


def once_differentiable(instead: str) -> Callable:
    """Decorate the backward of an autograd.Function, backward(ctx, saved, *gradients), that runs without a graph.

    Where create_graph asks for one, its results raise as soon as they are differentiated, by whatever the forward has
    saved or by the gradients that came in.

    Args:
        instead: the message: what is not there, and what to do.
    """

    def decorate(backward):
        @functools.wraps(backward)
        def once(ctx, *gradients):
            # read once: activation checkpointing recomputes at the first reading and refuses a second
            saved = ctx.saved_tensors
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            if not torch.is_grad_enabled():
                return results
            # what is to be differentiated has to lead there, or autograd would take it for unused
            sources = [x for x in (*saved, *gradients) if x is not None]
            made = [x for x in results if x is not None]
            refusing = iter(_Refusal.apply(instead, len(made), *made, *sources))
            return tuple(x if x is None else next(refusing) for x in results)

        return once

    return decorate


class _Refusal(torch.autograd.Function):
    """Its first tensors as they are, with a graph that raises a NotImplementedError."""

    @staticmethod
    def forward(ctx, instead, count, *tensors):
        ctx.instead = instead
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError(ctx.instead)
