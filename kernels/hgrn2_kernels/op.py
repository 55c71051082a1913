"""The public operator `chunk_hgrn2`. It checks its arguments, then runs Triton kernels on a GPU, or else PyTorch."""

import torch
from torch import Tensor

from hgrn2_kernels import torch_ops
from hgrn2_kernels.checks import check_chunk, check_kernels, checked_scale, split_fused
from hgrn2_kernels.inputs import Inputs


def implementation(device: torch.device | str, dtype: torch.dtype) -> str:
    """Return "triton" or "pytorch": the implementation that `chunk_hgrn2` uses for inputs of this device and dtype."""
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
    """Run the HGRN2 token mixer between its projections. It is differentiable once, and accurate for any gates.

    Each head computes, with lower bound b and state h:

        forget_t = b + (1 - b) sigmoid(f_t)
        h_t = diag(forget_t) h_{t-1} + (1 - forget_t) v_t^T
        o_t = scale * h_t^T silu(q_t)

    Gates, states and sums are fp32 for all inputs except fp64 ones, for which they are fp64. Autocast does not change
    that. Inputs may be strided views, such as the parts of one fused projection. The operator keeps its inputs for the
    backward, and computes everything else again. Where a long sequence is cut into segments, it also keeps the states
    between them, if they take at most a tenth of the memory of the inputs.

    On a CUDA device, fp32, bf16 and fp16 inputs run Triton kernels, whose heads have at most 256 channels. The kernels
    never wait for the device. Once they have run, they can be captured in a CUDA graph. They multiply in bf16 for
    16-bit inputs and in fp32 for fp32 inputs, and never in TF32. On a CPU, and for fp64 on any device, the operator
    runs in PyTorch as `chunk_hgrn2_pytorch` does.

    Args:
        q: [B, T, H, K] fp64, fp32, bf16 or fp16, raw query projection.
        f: [B, T, H, K] dtype of q, raw forget-gate projection, any finite value.
        v: [B, T, H, V] dtype of q, values.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1). None means a bound of 0. The values are not
            checked, because that would wait for the device. The gradient is defined as 0 on channels where the bound
            is exactly 0. There the bound is a constant of the model (its first layer), and kernels that work with log
            gates would return noise.
        scale: factor on the output. None means K**-0.5.
        initial_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), state before the first token of each sequence. N is
            B, or the number of packed sequences. None means zeros.
        output_final_state: whether to return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int32, boundaries of sequences that are packed along T. They start at 0, do not decrease,
            and end at T or before. B must be 1. Sequences may be empty. Tokens after the last boundary are padding:
            their outputs and gradients are 0, whatever they hold. The values are checked where PyTorch runs, and not
            checked by the kernels.
        save_states: whether to keep the states between chunks for the backward. On a GPU the backward is then a
            little faster. It keeps B * T * H * K * V / 64 bf16 numbers, or with fp32 inputs B * T * H * K * V / 32 fp32
            numbers. It has no effect where PyTorch runs.

    Returns:
        o: [B, T, H, V] dtype of v.
        final_state: [N, H, K, V] fp32 (fp64 with fp64 inputs), or None without output_final_state. The final state of
            an empty sequence is its initial state.

    Raises:
        ValueError: a shape, dtype, device or boundary is not as described, or the kernels cannot run (a head has more
            than 256 channels, or than 128 in fp32 on a GPU with 99 KiB of shared memory; the scale is 0; or the GPU has
            a compute capability below 8.0).
        NotImplementedError: a gradient is differentiated again, or an argument has a forward-mode derivative or is
            differentiated by torch.func. `recurrent_hgrn2` has all of these.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904. Raw projections and the scale are as in the published weights:
        fla-org/flash-linear-attention, fla/layers/hgrn2.py.
    """
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    inputs = _inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    if implementation(q.device, q.dtype) == "pytorch":
        return torch_ops.chunk(inputs, output_final_state, kernels=False)
    check_kernels(q, v, inputs.scale)
    return torch_ops.chunk(inputs, output_final_state, save_states)


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
    """Run `chunk_hgrn2` on one fused projection, whose gradient the kernels write directly.

    With three separate inputs, autograd would combine their gradients and move each of them twice more.

    Args:
        qfv: [B, T, H, 3, K] fp64, fp32, bf16 or fp16: q, f and v of each head, as one projection returns them.
        lower_bound, scale, initial_state, output_final_state, cu_seqlens, save_states: as in `chunk_hgrn2`, with V = K.

    Returns:
        o: [B, T, H, K] dtype of qfv.
        final_state: [N, H, K, K] fp32 (fp64 with fp64 inputs), or None without output_final_state.

    Raises:
        ValueError: qfv has another shape, or `chunk_hgrn2` would raise.
        NotImplementedError: a gradient is differentiated again.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, as in `chunk_hgrn2`.
    """
    q, f, v = split_fused(qfv)
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    inputs = _inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    if implementation(q.device, q.dtype) == "pytorch":
        return torch_ops.chunk(inputs, output_final_state, kernels=False)
    check_kernels(q, v, inputs.scale)
    return torch_ops.chunk_fused(
        qfv, lower_bound, initial_state, cu_seqlens, inputs.scale, output_final_state, save_states
    )


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
    """Run `chunk_hgrn2` in plain PyTorch on any device, for heads of any size.

    All of it is in fp32, or in fp64 for fp64 inputs. It copies cu_seqlens to the host, which waits for the device.

    Args:
        q, f, v, lower_bound, scale, initial_state, output_final_state, cu_seqlens: as in `chunk_hgrn2`.

    Returns:
        o and final_state, as `chunk_hgrn2` returns them.

    Raises:
        ValueError: a shape, dtype, device or boundary is not as `chunk_hgrn2` describes it.
        NotImplementedError: a gradient is differentiated again.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, as in `chunk_hgrn2`.
    """
    check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens)
    inputs = _inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale)
    return torch_ops.chunk(inputs, output_final_state, kernels=False)


def _inputs(q, f, v, lower_bound, initial_state, cu_seqlens, scale):
    return Inputs(q, f, v, lower_bound, initial_state, cu_seqlens, checked_scale(scale, q))
