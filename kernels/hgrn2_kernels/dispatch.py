"""The choice between the kernels for Hopper and those of chunk_triton, which run on every GPU."""

import torch
from torch import Tensor

from hgrn2_kernels import chunk_triton
from hgrn2_kernels.checks import capability


def kernels(shape: tuple[int, ...], V: int, dtype: torch.dtype, capability: tuple[int, int]) -> str:
    """ "hopper" or "triton", a pure function of its arguments.

    Args:
        shape: [B, T, H, K] of q.
        V: head dimension of v.
        dtype: of q, f and v.
        capability: compute capability of the device.
    """
    hopper = capability == (9, 0) and dtype == torch.bfloat16 and shape[3] == V == 128 and min(shape) > 0
    return "hopper" if hopper else "triton"


def module(q: Tensor, v: Tensor):
    """The module whose `chunk_forward` and `chunk_backward` serve these inputs."""
    # under the interpreter there is no GPU, and Gluon has no interpreter
    if q.is_cuda and kernels(tuple(q.shape), v.shape[3], q.dtype, capability(q.device)) == "hopper":
        from hgrn2_kernels import hopper

        return hopper
    return chunk_triton


def chunk_forward(q, f, v, *others, **options):
    """As chunk_triton.chunk_forward, by the kernels that serve the inputs."""
    return module(q, v).chunk_forward(q, f, v, *others, **options)


def chunk_backward(do, dfinal_state, q, f, v, *others, **options):
    """As chunk_triton.chunk_backward, by the kernels that ran the forward."""
    return module(q, v).chunk_backward(do, dfinal_state, q, f, v, *others, **options)
