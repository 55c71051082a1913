"""The forget gate over its lower bound, and its gradient.

The chunkwise form in PyTorch multiplies forget gates and never takes their logarithm. So a gate that closes completely
is an ordinary zero, and the gradient of the gate needs no division. The shards of a sequence exchange a logarithm,
because a product over all of their tokens would underflow.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forget_gate(f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute forget = b + (1 - b) sigmoid(f) and the key it leaves room for, k = 1 - forget.

    Args:
        f: [..., K] fp32 or fp64, raw forget gate. Infinities are allowed, and mean exactly open or closed.
        lower_bound: broadcastable to f, dtype of f, in [0, 1). None means no bound.

    Returns:
        forget: [..., K], in [b, 1].
        k: [..., K], (1 - b) sigmoid(-f), in [0, 1 - b]. It has a small relative error. Computed as 1 - forget, a k
            below 1e-7 would be lost.
    """
    forget, k = f.sigmoid(), f.neg().sigmoid_()
    if lower_bound is None:
        return forget, k
    room = 1 - lower_bound
    return forget.mul_(room).add_(lower_bound), k.mul_(room)


def forget_gate_backward(
    f: Tensor, lower_bound: Tensor | None, dforget: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `forget_gate` with respect to f, and to lower_bound before any sum over tokens.

    Args:
        f: [..., K], as in `forget_gate`.
        lower_bound: as in `forget_gate`.
        dforget: [..., K], gradient of forget; overwritten.
        dk: [..., K], gradient of k.

    Returns:
        df: [..., K].
        db: [..., K], 0 on channels where the bound is 0; None without a bound.
    """
    s, s_neg = f.sigmoid(), f.neg().sigmoid_()
    t = dforget.sub_(dk)
    df = s.mul_(s_neg).mul_(t)
    if lower_bound is None:
        return df, None
    db = s_neg.mul_(t).mul_(lower_bound > 0)
    return df.mul_(1 - lower_bound), db


def log_forget(f: Tensor, bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the log of the forget gate, in nats, and the key. f and bound are as in `forget_gate`.

    The log is finite where f is.
    """
    forget, k = forget_gate(f, bound)
    if bound is None:
        return F.logsigmoid(f), k
    # near 1 the distance of the gate from 1 is the accurate number, and near 0 without a bound f itself is
    g = torch.where(k < 0.5, torch.log1p(-k), forget.log())
    return torch.where(bound > 0, g, F.logsigmoid(f)), k


def log_forget_backward(
    f: Tensor, bound: Tensor | None, dg: Tensor, dk: Tensor | float
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of `log_forget` with respect to f, and to bound before any sum over tokens.

    With s = sigmoid(f): d log forget = (1 - b) (1 - s) (s / forget) df. The ratio lies in (0, 1]. It is the
    sigmoid of f - log b, which needs no division and is 1 without a bound.
    """
    s, s_neg = f.sigmoid(), f.neg().sigmoid_()
    if bound is None:
        return s_neg * (dg - s * dk), None
    df = s_neg * (1 - bound) * ((f - bound.log()).sigmoid_() * dg - s * dk)
    forget, _ = forget_gate(f, bound)
    # selected and not multiplied by 0, because without a bound the gate may be 0
    db = torch.where(bound > 0, s_neg * (dg / forget - dk), 0.0)
    return df, db
