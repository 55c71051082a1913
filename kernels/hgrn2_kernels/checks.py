"""Checks of the arguments of the operators. Each error says what is wrong and what to do instead."""

import functools

import torch
from torch._C import _functorch
from torch.autograd import forward_ad

# compute capabilities of GPUs with 99 KiB of shared memory for a block (CUDA programming guide)
SMALL_SHARED_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
TRANSFORMS = (
    "the HGRN2 operators have no forward-mode derivatives, and cannot be differentiated by torch.func (grad, jvp, "
    "jacrev, ..): call backward() or torch.autograd.grad, or use recurrent_hgrn2, the recurrence token by token"
)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_chunk(q, f, v, lower_bound, initial_state, cu_seqlens):
    """Check the shapes, dtypes and devices of the arguments of `chunk_hgrn2`.

    Values are not checked, because that would wait for the device.

    Raises:
        ValueError: an argument is wrong. The message names the first one.
    """
    check_inputs(q, f, v)
    check_transforms(q, f, v, lower_bound, initial_state)
    B, _, H, K = q.shape
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q)
    if lower_bound is not None:
        check_like_state("lower_bound", lower_bound, (H, K), q)
    if initial_state is not None:
        N = B if cu_seqlens is None else len(cu_seqlens) - 1
        check_like_state("initial_state", initial_state, (N, H, K, v.shape[-1]), q)


def check_transforms(*tensors):
    """Check that no argument is differentiated in a way that the operators do not have.

    PyTorch itself would leave out the tangents of forward-mode derivatives without a message.

    Raises:
        NotImplementedError: an argument has a tangent, or is differentiated by torch.func.
    """
    compiled = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0 and (compiled or any(map(_has_tangent, tensors))):
        raise NotImplementedError(TRANSFORMS)
    if not compiled and _functorch.peek_interpreter_stack() is not None and any(map(_is_differentiated, tensors)):
        raise NotImplementedError(TRANSFORMS)


def _has_tangent(x):
    return x is not None and forward_ad.unpack_dual(x).tangent is not None


def _is_differentiated(x):
    """Return whether x belongs to a transform of torch.func that differentiates, at any level of transforms."""
    while x is not None and _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            return True
        x = _functorch.get_unwrapped(x)
    return False


def checked_scale(scale, q):
    """Return the scale, or its default for heads as wide as those of q if it is None.

    Raises:
        ValueError: it is a tensor, whose gradient would be lost.
    """
    if isinstance(scale, torch.Tensor):
        raise ValueError("scale must be a number, got a tensor, which would get no gradient: multiply the output by it")
    return q.shape[-1] ** -0.5 if scale is None else scale


def split_fused(qfv):
    """Split one projection [B, T, H, 3, K] into views q, f and v, [B, T, H, K] each.

    Raises:
        ValueError: qfv has another shape.
    """
    if qfv.dim() != 5 or qfv.shape[3] != 3:
        raise ValueError(f"qfv must be [B, T, H, 3, K], got {shape_of(qfv)}: split it with unflatten(-1, (H, 3, K))")
    return qfv.unbind(-2)


def check_kernels(q, v, scale=1.0):
    """Check what the Triton kernels require in addition to `check_chunk`.

    Raises:
        ValueError: a head has more channels than `widest_head`, the scale is 0, or the GPU is too old.
    """
    K, V = q.shape[-1], v.shape[-1]
    if scale == 0:
        raise ValueError("the Triton kernels divide by the scale, and it is 0: use chunk_hgrn2_pytorch")
    widest = widest_head(q.dtype, capability(q.device))
    if not widest:
        raise ValueError(
            f"the Triton kernels need a GPU of compute capability 8.0 or higher, and {q.device} has "
            f"{'.'.join(map(str, capability(q.device)))}: use chunk_hgrn2_pytorch"
        )
    if max(K, V) > widest:
        raise ValueError(
            f"the kernels take at most {widest} channels per head in {q.dtype} on this GPU, got K = {K}, V = {V}: use "
            "chunk_hgrn2_pytorch"
        )


def widest_head(dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Return the largest K or V of a head that the Triton kernels take, or 0 if they do not run on such a GPU.

    The exact form of chunk_gradient needs most shared memory. GPUs other than those for data centers have 99 KiB for a
    block of threads, which is not enough for fp32 heads of more than 128 channels.

    Args:
        dtype: dtype of the inputs.
        capability: compute capability of the GPU.
    """
    if capability < (8, 0):
        return 0
    return 128 if dtype == torch.float32 and capability in SMALL_SHARED_MEMORY else 256


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU, or (9, 0) if there is no GPU, as in the interpreter."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (9, 0)


def borders_on_host(cu_seqlens, T: int) -> list[int]:
    """Return the values of cu_seqlens after checking them.

    Raises:
        ValueError: they do not start at 0, they decrease, or they end beyond T.
    """
    borders = cu_seqlens.tolist()
    if borders[0] != 0 or borders[-1] > T or borders != sorted(borders):
        raise ValueError(
            f"cu_seqlens must go from 0 to at most T = {T} without decreasing, got {borders}: pass cumulative lengths"
        )
    return borders


def check_inputs(q, f, v):
    """Check that q, f and v fit each other."""
    if q.dim() != 4 or f.shape != q.shape or v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q and f must be [B, T, H, K] and v [B, T, H, V], got {shape_of(q)}, {shape_of(f)} and {shape_of(v)}: "
            "put the batch dimension first and split off the heads with unflatten(-1, (H, -1))"
        )
    if 0 in q.shape or 0 in v.shape:
        raise ValueError(
            f"no dimension may be 0, got q {shape_of(q)} and v {shape_of(v)}: skip the call if there are no tokens"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be float64, float32, bfloat16 or float16, got {q.dtype}: cast q, f and v")
    if not q.dtype == f.dtype == v.dtype:
        raise ValueError(f"q, f and v must share a dtype, got {q.dtype}, {f.dtype}, {v.dtype}: cast them")
    if not q.device == f.device == v.device:
        raise ValueError(f"q, f and v must share a device, got {q.device}, {f.device}, {v.device}: move them")


def check_cu_seqlens(cu_seqlens, q):
    """Check the shape and the dtype of cu_seqlens, and that q has one row."""
    if q.shape[0] != 1:
        raise ValueError(
            f"cu_seqlens needs B = 1, got B = {q.shape[0]}: pack the sequences along T, "
            "or drop cu_seqlens if each row is one sequence"
        )
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32, got {cu_seqlens.dtype}: convert it with .int()")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"cu_seqlens must be [N + 1], got {shape_of(cu_seqlens)}: pass 0 and the end of each sequence")


def check_like_state(name, x, shape, q):
    """Check a tensor in the dtype of the states: fp64 if q is fp64, else fp32."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if x.shape != shape:
        raise ValueError(f"{name} must be {list(shape)} to match q, got {shape_of(x)}: reshape or slice it")
    if x.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} for {q.dtype} inputs, got {x.dtype}: convert it")
    if x.device != q.device:
        raise ValueError(f"{name} must be on {q.device} like q, got {x.device}: move it")


def shape_of(x):
    """Return the shape of x as a list, for messages."""
    return list(x.shape)
