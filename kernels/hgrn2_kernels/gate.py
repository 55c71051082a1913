"""The forget gate over its lower bound, and its gradient.

The chunkwise form multiplies forget gates and never takes their logarithm, so a gate that closes
completely is an ordinary zero, and the gradient of the gate needs no division.
"""

from torch import Tensor


def forget_gate(f: Tensor, lower_bound: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute forget = b + (1 - b) sigmoid(f) and the key it leaves room for, k = 1 - forget.

    Args:
        f: [..., K] fp32 or fp64, raw forget gate; infinities are allowed and mean exactly open or closed.
        lower_bound: broadcastable to f, dtype of f, in [0, 1); None for no bound.

    Returns:
        forget, in [b, 1], and k = (1 - b) sigmoid(-f), in [0, 1 - b], both to relative precision:
        subtracting one from 1 would leave nothing of a k below 1e-7.
    """
    forget, k = f.sigmoid(), f.neg().sigmoid_()
    if lower_bound is None:
        return forget, k
    room = 1 - lower_bound
    return forget.mul_(room).add_(lower_bound), k.mul_(room)


def forget_gate_backward(
    f: Tensor, lower_bound: Tensor | None, dforget: Tensor, dk: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `forget_gate` with respect to f, and to lower_bound before any sum over tokens.

    Args:
        f: [..., K], as in `forget_gate`.
        lower_bound: as in `forget_gate`.
        dforget: [..., K], gradient of forget; overwritten.
        dk: [..., K], gradient of k.

    Returns:
        df: [..., K].
        db: [..., K], zero on the channels where the bound is 0; None without a bound.
    """
    s, s_neg = f.sigmoid(), f.neg().sigmoid_()
    t = dforget.sub_(dk)
    df = s.mul_(s_neg).mul_(t)
    if lower_bound is None:
        return df, None
    db = s_neg.mul_(t).mul_(lower_bound > 0)
    return df.mul_(1 - lower_bound), db
