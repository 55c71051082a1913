"""The memory layouts that the kernels take: the last dimension is contiguous, and the tokens of a chunk are in reach.

Kernels compute the address of a head and of the first token of a chunk with 64 bits, and of the other tokens with 32.
"""

import torch
from torch import Tensor

# with a stride along time below this, the 64 tokens of the longest chunk are within 2^31 numbers of each other
REACH = 2**31 // 64


def unit_stride(x: Tensor) -> Tensor:
    """Return x [B, T, ..], or a contiguous copy if its strides do not suit the kernels."""
    return x if suits(x) else x.contiguous()


def dense_like(x: Tensor) -> Tensor:
    """Return a new dense tensor of the shape of x, with a contiguous last dimension.

    Its dimensions have the same order in memory as those of x, if the kernels can take that order.
    """
    if x.stride()[-1] == 1:
        like = torch.empty_like(x)
        if suits(like):
            return like
    return x.new_empty(x.shape)


def suits(x: Tensor) -> bool:
    """Return whether the kernels can take the strides of x [B, T, ..]."""
    strides = x.stride()
    return strides[-1] == 1 and strides[1] < REACH
