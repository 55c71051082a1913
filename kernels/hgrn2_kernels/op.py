"""The public operator: checks what a caller can get wrong, then runs the chunkwise form, on a GPU in Triton."""

import torch
from torch import Tensor

from hgrn2_kernels import library
from hgrn2_kernels.checks import check_chunk, check_kernels, split_fused


def implementation(device: torch.device | str, dtype: torch.dtype) -> str:
    """What `chunk_hgrn2` runs for inputs of this device and dtype: "triton" or "pytorch"."""
    return "triton" if torch.device(device).type == "cuda" and dtype != torch.float64 else "pytorch"


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
    save_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The HGRN2 token mixer between its projections, differentiable (once) and exact for gates of any strength.

    Per head, with b the lower bound:

        forget_t = b + (1 - b) sigmoid(f_t)
        h_t = diag(forget_t) h_{t-1} + (1 - forget_t) v_t^T
        o_t = scale * h_t^T silu(q_t)

    Gates, states and sums are fp32 whatever the inputs (fp64 if they are fp64), autocast or not. Inputs may be
    strided views, such as the parts of one fused projection. Only the inputs are kept for the backward, and at most
    a tenth more where a long sequence is cut into segments; the rest is computed again.

    On CUDA, heads of up to 256 run Triton kernels (fp64 aside), which never wait for the device and can be captured in
    a CUDA graph once they have run: products there are of bf16 for 16-bit inputs and of fp32 for fp32 inputs, never of
    TF32. Elsewhere it runs plain PyTorch, as `chunk_hgrn2_pytorch` does anywhere.

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
        cu_seqlens: [N + 1] int32, borders of sequences packed along T: from 0 to at most T, not decreasing. B must
            be 1; sequences may be empty. Tokens behind the last border are padding: whatever they hold, their outputs
            and gradients are 0. Values are checked where PyTorch runs, and not by the kernels.
        save_states: keep the states between chunks for the backward, which on a GPU is a little faster then: a bf16
            number for each (token, head, channel of K, channel of V) / 64, fp32 and / 32 for fp32 inputs. Without
            effect where PyTorch runs.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), that of an empty sequence being its initial
            state; None unless asked for.

    Raises:
        ValueError: on shapes, dtypes, devices or borders other than these, or where the kernels cannot run.
        NotImplementedError: where a gradient is differentiated again; `recurrent_hgrn2` has second derivatives.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904; raw projections and scale as in the published weights,
        fla-org/flash-linear-attention, fla/layers/hgrn2.py.
    """
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    if implementation(q.device, q.dtype) == "pytorch":
        return _pytorch(q, f, v, lower_bound, scale, initial_state, output_final_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_kernels(q, v, scale)
    return library.chunk(q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states)


def chunk_hgrn2_fused(
    qfv: Tensor,
    lower_bound: Tensor | None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    save_states: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`chunk_hgrn2` of one projection, whose gradient the kernels write in one piece.

    Autograd would put it together from those of q, f and v, which moves each of them twice more.

    Args:
        qfv: [B, T, H, 3, K] fp64, fp32, bf16 or fp16, q, f and v of each head, as one projection gives them.
        lower_bound, scale, initial_state, output_final_state, cu_seqlens, save_states: as in `chunk_hgrn2`.

    Returns:
        o and final_state, as `chunk_hgrn2` of qfv.unbind(-2).

    Raises:
        ValueError: as `chunk_hgrn2`, and on another shape of qfv.
    """
    q, f, v = split_fused(qfv)
    options = dict(scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)
    if implementation(q.device, q.dtype) == "pytorch":
        return chunk_hgrn2_pytorch(q, f, v, lower_bound, output_final_state=output_final_state, **options)
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    check_kernels(q, v, scale)
    return library.chunk_fused(qfv, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states)


def chunk_hgrn2_pytorch(
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
    """`chunk_hgrn2` in plain PyTorch on any device, in fp32 (fp64) throughout. It reads cu_seqlens on the host."""
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    return _pytorch(q, f, v, lower_bound, scale, initial_state, output_final_state, cu_seqlens)


def _pytorch(q, f, v, lower_bound, scale, initial_state, output_final_state, cu_seqlens):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return library.chunk(
        q, f, v, lower_bound, initial_state, cu_seqlens, scale, output_final_state, save_states=False, kernels=False
    )
