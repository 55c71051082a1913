"""The HGRN2 recurrence, one token at a time: the definition that everything faster is compared with.

Shares no code with the chunkwise form, so that an error in one cannot hide in the other.
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
    """Step the state over the tokens in the dtype of the inputs, under ordinary autograd.

    Slow and memory hungry by design: give it float64 for a gold result. Arguments and results are those of
    `chunk_hgrn2`, which also says what they mean, with two differences: nothing is upcast or checked, and
    the bound's gradient is the true one everywhere, a bound of exactly 0 included.

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
    """The recurrence over q, f [T, H, K] and v [T, H, V] from state h [H, K, V]; returns (o, h)."""
    b = f.new_zeros(f.shape[1:]) if lower_bound is None else lower_bound.to(f.dtype)
    # not torch.sigmoid: autograd multiplies by 1 - sigmoid, and with every gate at f = -30 the cancellation
    # leaves df four right digits in float64
    forget = b + (1 - b) * F.logsigmoid(f).exp()
    k = (1 - b) * F.logsigmoid(-f).exp()
    q = F.silu(q) * (q.shape[-1] ** -0.5 if scale is None else scale)
    h = v.new_zeros(*k.shape[1:], v.shape[-1]) if h is None else h.to(v.dtype)

    o = [v[:0]]
    for q_t, k_t, v_t, forget_t in zip(q, k, v, forget, strict=True):
        h = forget_t[..., None] * h + k_t[..., None] * v_t[:, None]
        o.append(torch.einsum("hk,hkv->hv", q_t, h)[None])
    return torch.cat(o), h
