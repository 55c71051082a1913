"""The decoding step `step_hgrn2`: it runs a few new tokens per sequence and updates a cache of states in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels import torch_ops
from hgrn2_kernels.checks import check_inputs, check_like_state, check_transforms, checked_scale, shape_of
from hgrn2_kernels.gate import forget_gate


def step_hgrn2(
    q: Tensor,
    f: Tensor,
    v: Tensor,
    lower_bound: Tensor | None,
    state: Tensor,
    slots: Tensor | None = None,
    *,
    scale: float | None = None,
) -> Tensor:
    """Advance each sequence by its new tokens, as `chunk_hgrn2` would from its state. There is no gradient.

    On a CUDA device this is one launch that reads and writes each state once. It never waits for the device, and the
    launch does not depend on any values, so it can be captured in a CUDA graph. On a CPU, and for fp64 inputs on any
    device, it runs in PyTorch, which waits for slots.

    Args:
        q: [N, T, H, K] fp64, fp32, bf16 or fp16, raw query projection of the T new tokens. T should be small, because
            the tokens are computed one after the other. q, f and v may be strided views, such as the parts of one fused
            projection, if the last dimension is contiguous.
        f: [N, T, H, K] dtype of q, raw forget-gate projection, any finite value.
        v: [N, T, H, V] dtype of q, values.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1). None means a bound of 0.
        state: [S, H, K, V] fp32 (fp64 with fp64 inputs), cached states, each contiguous. The states of the N sequences
            are overwritten with the states after their last new tokens.
        slots: [N] int32 or int64, in [-1, S): the row of the cache that holds the state of each sequence. A sequence
            with slot -1 is padding: it does not change the cache, and its output is 0. Two sequences must not share
            any other slot. The values are not checked, because that would wait for the device. None means that the
            state of sequence n is row n, and S = N.
        scale: factor on the output. None means K**-0.5.

    Returns:
        o: [N, T, H, V] dtype of v.

    Raises:
        ValueError: a shape, dtype, device or stride is not as described, or an input requires a gradient while
            gradients are enabled.
        NotImplementedError: an input has a forward-mode derivative, or is differentiated by torch.func.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2; raw projections and the scale are as in `chunk_hgrn2`.
    """
    check_inputs(q, f, v)
    check_transforms(q, f, v, lower_bound, state)
    _check_state(state, slots, q, v)
    if lower_bound is not None:
        check_like_state("lower_bound", lower_bound, q.shape[2:], q)
    _check_strides(q, f, v, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, f, v, lower_bound, state)):
        raise ValueError(
            "step_hgrn2 has no gradient, but an input requires one: decode under torch.no_grad() or "
            "torch.inference_mode(), and train with chunk_hgrn2"
        )
    scale = checked_scale(scale, q)
    advance = _advance if torch_ops.is_eager(q) else torch.ops.hgrn2.step
    return advance(q, f, v, lower_bound, state, slots, scale)


def _advance(q, f, v, lower_bound, state, slots, scale):
    if q.is_cuda and q.dtype != torch.float64:
        # a CPU needs no triton
        from hgrn2_kernels.step_kernel import launch_step

        return launch_step(q, f, v, lower_bound, state, slots, scale)
    return _step(q, f, v, lower_bound, state, slots, scale)


torch_ops.define(
    "step(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor(a!) state, Tensor? slots, float scale) -> Tensor",
    _advance,
    lambda q, f, v, lower_bound, state, slots, scale: v.new_empty(v.shape),
)


def _step(q, f, v, lower_bound, state, slots, scale):
    """Compute the same as the kernel in plain PyTorch. The arguments are as in `step_hgrn2`."""
    N, T, H, _ = q.shape
    o = v.new_zeros(N, T, H, v.shape[-1])
    # the row of the state of each sequence, and which sequences have one
    rows, active = slice(None), slice(None)
    if slots is not None:
        active = slots >= 0
        rows = slots[active].long()
    q, f, v = (x[active].to(state.dtype) for x in (q, f, v))
    q = F.silu(q) * scale
    forget, k = (x[..., None] for x in forget_gate(f, lower_bound))
    h = state[rows]
    for t in range(T):
        k_t, v_t = k[:, t], v[:, t, :, None]
        # A forget gate near 1 is rounded. If it hardly changes, it is rounded in the same direction at each token, and
        # the errors add up.
        h = torch.where(k_t < 0.5, h + k_t * (v_t - h), forget[:, t] * h + k_t * v_t)
        o[active, t] = (q[:, t, :, :, None] * h).sum(-2).to(o.dtype)
    state[rows] = h
    return o


def _check_state(state, slots, q, v):
    N, _, H, K = q.shape
    if slots is None:
        if state.dim() == 4 and state.shape[0] != N:
            raise ValueError(
                f"state has {state.shape[0]} rows for {N} sequences: pass slots, or slice state to its rows"
            )
        return check_like_state("state", state, (N, H, K, v.shape[-1]), q)
    S = state.shape[0] if state.dim() else 0
    check_like_state("state", state, (S, H, K, v.shape[-1]), q)
    if slots.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"slots must be int32 or int64, got {slots.dtype}: convert it with .int()")
    if slots.shape != (N,):
        raise ValueError(
            f"slots must be [{N}] to match q, got {shape_of(slots)}: pass one slot per sequence, -1 for padding"
        )
    if slots.device != q.device:
        raise ValueError(f"slots must be on {q.device} like q, got {slots.device}: move it")


def _check_strides(q, f, v, state):
    for name, x in (("q", q), ("f", f), ("v", v)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {list(x.stride())}: "
                f"pass a view of the projection that keeps a head's channels together, or {name}.contiguous()"
            )
    # rows may lie apart, as in a view of one layer of a cache of all layers, but they must not overlap
    S, row = state.shape[0], state.shape[1:].numel()
    if not state[:1].is_contiguous() or (S > 1 and state.stride(0) < row):
        raise ValueError(
            f"each row of state must be contiguous and must not overlap another, got strides {list(state.stride())}: "
            "keep the cache as [S, H, K, V] and pass it without a copy, which would be updated instead of the cache"
        )
