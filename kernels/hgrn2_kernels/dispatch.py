"""Choose between the kernels for Hopper and the kernels of chunk_triton.py, which run on every supported GPU."""

import re

import torch
import triton
from torch import Tensor

from hgrn2_kernels import chunk_triton
from hgrn2_kernels.checks import capability
from hgrn2_kernels.inputs import Inputs

# whether the kernels for Hopper run where they can; tests and benchmarks turn them off to run those of chunk_triton.py
IN_USE = True
# The oldest and newest release of Triton that run the kernels for Hopper. GPUs have run them with these two, and 3.8
# compiles them with as few spilled registers as 3.6. They are written in Gluon, which is experimental and changes with
# each release. The kernels of chunk_triton.py run with newer releases too.
GLUON = (3, 6), (3, 9)
RELEASE = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))


def kernels(
    shape: tuple[int, ...],
    V: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    release: tuple[int, ...] = RELEASE,
) -> str:
    """Return "hopper" or "triton": the kernels for inputs of this shape and dtype on a device of this capability.

    Args:
        shape: [B, T, H, K] of q.
        V: head dimension of v.
        dtype: dtype of q, f and v.
        capability: compute capability of the device.
        release: major and minor number of Triton's release.
    """
    fits = dtype == torch.bfloat16 and shape[3] == V == 128
    return "hopper" if capability == (9, 0) and fits and GLUON[0] <= release <= GLUON[1] else "triton"


def by_hopper(q: Tensor, v: Tensor) -> bool:
    """Return whether the kernels for Hopper take these inputs, which may be fake tensors."""
    # in the interpreter there is no GPU, and Gluon has no interpreter
    return IN_USE and q.is_cuda and kernels(tuple(q.shape), v.shape[3], q.dtype, capability(q.device)) == "hopper"


def module(q: Tensor, v: Tensor):
    """Return the module whose `chunk_forward` and `chunk_backward` take these inputs."""
    if by_hopper(q, v):
        from hgrn2_kernels import hopper

        return hopper
    return chunk_triton


def launches(q: Tensor, v: Tensor) -> type[chunk_triton.Launches]:
    """Return the class whose launches take these inputs."""
    if by_hopper(q, v):
        from hgrn2_kernels import hopper

        return hopper.HopperLaunches
    return chunk_triton.Launches


def chunk_forward(inputs: Inputs, *options, **named):
    """Run chunk_forward of the kernels for these inputs; see chunk_triton.py."""
    return module(inputs.q, inputs.v).chunk_forward(inputs, *options, **named)


def chunk_backward(do, dfinal_state, inputs: Inputs, *options, **named):
    """Run chunk_backward of the kernels that ran the forward; see chunk_triton.py."""
    return module(inputs.q, inputs.v).chunk_backward(do, dfinal_state, inputs, *options, **named)
