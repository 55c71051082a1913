"""Decoding: a few new tokens a sequence against a cache of states, `step_hgrn2`. Updates the cache in place."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels import library
from hgrn2_kernels.checks import check_inputs, check_like_state, shape_of
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
    """Advance each sequence by its new tokens, as `chunk_hgrn2` would from its state, without gradients.

    On CUDA this is one launch that reads and writes each state once. It never waits for the device, and nothing
    about the launch depends on values, so that it can be captured in a CUDA graph; only fp64 runs in plain PyTorch
    there, as on a CPU, and then waits for slots.

    Args:
        q: [N, T, H, K] fp64, fp32, bf16 or fp16, raw query projection of the T new tokens (one, or a few, as they
            are taken one after the other). It, f and v may be strided views, such as the parts of one fused
            projection, with the last dimension contiguous.
        f: [N, T, H, K] dtype of q, raw forget-gate projection, any finite value.
        v: [N, T, H, V] dtype of q, values.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1); None for a bound of 0.
        state: [S, H, K, V] fp32 (fp64 with fp64 inputs), cached states, each contiguous; those of the sequences
            are replaced by the states after their last new token.
        slots: [N] int32 or int64, where in the cache each sequence has its state, in [-1, S). A sequence with
            slot -1 is padding: it leaves the cache alone and its output is 0. Two sequences must not share any
            other slot. Values are not checked, as that would wait for the device. None means that sequence n has
            state n, with S = N.
        scale: factor on the output; K**-0.5 when None.

    Returns:
        o: [N, T, H, V] dtype of v.

    Raises:
        ValueError: on shapes, dtypes, devices or strides other than these, or where a gradient is asked for.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2; raw projections and scale as in `chunk_hgrn2`.
    """
    check_inputs(q, f, v)
    _check_state(state, slots, q, v)
    if lower_bound is not None:
        check_like_state("lower_bound", lower_bound, q.shape[2:], q)
    _check_strides(q, f, v, state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, f, v, lower_bound, state)):
        raise ValueError(
            "step_hgrn2 has no gradient, and an input requires one: decode under torch.no_grad() or "
            "torch.inference_mode(), and train with chunk_hgrn2"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    advance = _advance if library.is_eager(q) else torch.ops.hgrn2.step
    return advance(q, f, v, lower_bound, state, slots, scale)


def _advance(q, f, v, lower_bound, state, slots, scale):
    if q.is_cuda and q.dtype != torch.float64:
        # a CPU needs no triton
        from hgrn2_kernels.step_kernel import launch_step

        return launch_step(q, f, v, lower_bound, state, slots, scale)
    with torch.autocast(q.device.type, enabled=False):
        return _step(q, f, v, lower_bound, state, slots, scale)


library.define(
    "step(Tensor q, Tensor f, Tensor v, Tensor? lower_bound, Tensor(a!) state, Tensor? slots, float scale) -> Tensor",
    _advance,
    lambda q, f, v, lower_bound, state, slots, scale: v.new_empty(v.shape),
)


def _step(q, f, v, lower_bound, state, slots, scale):
    """What the kernel computes, in plain PyTorch. Arguments as in `step_hgrn2`."""
    N, T, H, _ = q.shape
    o = v.new_zeros(N, T, H, v.shape[-1])
    # where each sequence has its state, and which sequences have one
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
        # a forget gate near 1 is rounded, and the same way at each token if it hardly changes
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
            f"slots must be [{N}] to go with q, got {shape_of(slots)}: one slot a sequence, -1 for padding"
        )
    if slots.device != q.device:
        raise ValueError(f"slots must be on {q.device} like q, got {slots.device}: move it")


def _check_strides(q, f, v, state):
    for name, x in (("q", q), ("f", f), ("v", v)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {list(x.stride())}: "
                "pass a view of the projection that keeps a head's channels together, or .contiguous()"
            )
    # rows may lie apart, as those of one layer in a cache of all layers, but not on top of each other
    S, row = state.shape[0], state.shape[1:].numel()
    if not state[:1].is_contiguous() or (S > 1 and state.stride(0) < row):
        raise ValueError(
            f"each row of state must be contiguous and apart from the others, got strides {list(state.stride())}: "
            "keep the cache as [S, H, K, V]; a copy would not be updated"
        )
