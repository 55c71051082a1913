"""The HGRN2 recurrence, one token at a time. It is the definition that all faster forms are compared with.

It shares no code with the chunkwise form, so an error in one cannot hide in the other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def recurrent_hgrn2(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Step the state over the tokens in the dtype of the inputs, with ordinary autograd.

    It is slow and takes much memory. Call it with float64 inputs for a reference result. It can be differentiated any
    number of times. It differs from `chunk_hgrn2` in two ways: it computes in the dtype of its inputs and checks
    nothing, and the gradient of the bound is the true one also where the bound is exactly 0.

    Args:
        q: [B, T, H, K], raw query projection.
        f: [B, T, H, K] dtype of q, raw forget-gate projection.
        v: [B, T, H, V] dtype of q, values.
        lower_bound: [H, K], in [0, 1). None means a bound of 0.
        scale: factor on the output. None means K**-0.5.
        initial_state: [N, H, K, V], state before the first token of each of the N sequences. None means zeros.
        output_final_state: whether to return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int32, boundaries of sequences packed along T, as in `chunk_hgrn2`.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] dtype of v, or None without output_final_state.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2 (state expansion by outer products).
    """
    if cu_seqlens is None:
        spans = [(b, slice(None)) for b in range(q.shape[0])]
    else:
        borders = cu_seqlens.tolist()
        spans = [(0, slice(start, end)) for start, end in zip(borders, borders[1:], strict=False)]

    outputs, states = [], []
    for n, (b, span) in enumerate(spans):
        h = None if initial_state is None else initial_state[n]
        o, h = _one_sequence(q[b, span], f[b, span], v[b, span], lower_bound, scale, h)
        outputs.append(o)
        states.append(h)
    if cu_seqlens is None:
        o = torch.stack(outputs)
    else:
        o = F.pad(torch.cat(outputs), (0, 0, 0, 0, 0, q.shape[1] - borders[-1]))[None]
    return o, torch.stack(states) if output_final_state else None


def _one_sequence(q, f, v, lower_bound, scale, h):
    """Run the recurrence over q, f [T, H, K] and v [T, H, V] from state h [H, K, V], and return (o, h)."""
    b = f.new_zeros(f.shape[1:]) if lower_bound is None else lower_bound.to(f.dtype)
    # This is not torch.sigmoid, because its autograd multiplies by 1 - sigmoid. With every gate at f = -30, that
    # cancellation leaves df four correct digits in float64.
    forget = b + (1 - b) * F.logsigmoid(f).exp()
    k = (1 - b) * F.logsigmoid(-f).exp()
    q = F.silu(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
    h = v.new_zeros(*k.shape[1:], v.shape[-1]) if h is None else h.to(v.dtype)

    o = [v[:0]]
    for q_t, k_t, v_t, forget_t in zip(q, k, v, forget, strict=True):
        h = forget_t[..., None] * h + k_t[..., None] * v_t[:, None]
        # a product and a sum, because autocast would round the operands of a matrix product
        o.append((q_t[..., None] * h).sum(-2)[None])
    return torch.cat(o), h
