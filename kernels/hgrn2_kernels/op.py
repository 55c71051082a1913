"""The public operator: checks what a caller can get wrong, then runs the chunkwise form."""

import torch
from torch import Tensor

from hgrn2_kernels.chunkwise import ChunkHGRN2

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def chunk_hgrn2(
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
    """The HGRN2 token mixer between its projections, differentiable and exact for gates of any strength.

    Per head, with b the lower bound:

        forget_t = b + (1 - b) sigmoid(f_t)
        h_t = diag(forget_t) h_{t-1} + (1 - forget_t) v_t^T
        o_t = scale * h_t^T silu(q_t)

    Activations, gates, states and sums are fp32 whatever the inputs (fp64 if they are fp64), autocast or not.
    Inputs may be strided views, such as the parts of one fused projection. Only the inputs are kept for the
    backward, which recomputes the rest.

    Args:
        q: [B, T, H, K] fp64, fp32, bf16 or fp16, raw query projection.
        f: [B, T, H, K] dtype of q, raw forget-gate projection, any finite value.
        v: [B, T, H, V] dtype of q, values.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1); None for a bound of 0. Values are not
            checked, as that would wait for the device. Its gradient is zero by definition on channels where
            it is exactly 0: there the bound is a constant of the model (its first layer), and a kernel that
            works with log gates has only noise to report.
        scale: factor on the output; K**-0.5 when None.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), state before the first token of each
            sequence, N being B or the number of packed sequences; zeros when None.
        output_final_state: whether to return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int32, borders of sequences packed along T: from 0 to T, not decreasing. B must
            be 1; sequences may be empty. Its values are read on the host, which waits for the device.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), that of an empty sequence being its initial
            state; None unless asked for.

    Raises:
        ValueError: on shapes, dtypes, devices or borders other than these.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904; raw projections and scale as in the published weights,
        fla-org/flash-linear-attention, fla/layers/hgrn2.py.
    """
    _check_inputs(q, f, v)
    borders = None if cu_seqlens is None else _check_borders(cu_seqlens, q)
    B, _, H, K = q.shape
    if lower_bound is not None:
        _check_like_state("lower_bound", lower_bound, (H, K), q)
    if initial_state is not None:
        N = B if borders is None else len(borders) - 1
        _check_like_state("initial_state", initial_state, (N, H, K, v.shape[-1]), q)
    scale = K**-0.5 if scale is None else scale
    o, final_state = ChunkHGRN2.apply(q, f, v, lower_bound, initial_state, scale, borders)
    return o, final_state if output_final_state else None


def _check_inputs(q, f, v):
    if q.dim() != 4 or f.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q and f must be [B, T, H, K] and v [B, T, H, V], got {_shape(q)}, {_shape(f)} and {_shape(v)}: "
            "put batch before time and split the heads off with unflatten(-1, (H, -1))"
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(f"no dimension may be 0, got q {_shape(q)} and v {_shape(v)}: without tokens, skip the call")
    if q.dtype not in _DTYPES:
        raise ValueError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}: cast q, f and v")
    if not q.dtype == f.dtype == v.dtype:
        raise ValueError(f"q, f and v must share a dtype, got {q.dtype}, {f.dtype}, {v.dtype}: cast them")
    if not q.device == f.device == v.device:
        raise ValueError(f"q, f and v must share a device, got {q.device}, {f.device}, {v.device}: move them")


def _check_borders(cu_seqlens, q):
    """Check cu_seqlens against q and return it as a list."""
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs B = 1, got B = {q.shape[0]}: pack the sequences along T, "
            "or drop cu_seqlens if each row is one sequence"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}: convert it with .int()")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N + 1], got {_shape(cu_seqlens)}: 0, .., T")
    T, borders = q.shape[1], cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] != T or borders != sorted(borders):
        raise ValueError(
            f"cu_seqlens must go from 0 to T = {T} without decreasing, got {borders}: "
            "pass cumulative lengths, and make padding at the end a sequence of its own"
        )
    return borders


def _check_like_state(name, x, shape, q):
    """Check a tensor that is kept in the accumulation dtype."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} to go with q, got {_shape(x)}: reshape or slice it")
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} for {q.dtype} inputs, got {x.dtype}: keep it in that")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {x.device}: move it")


def _shape(x):
    return list(x.shape)
