"""How tensors lie in memory, as far as the kernels care: the last dimension innermost, a chunk's tokens within reach.

Kernels count in 64 bits up to a head and the first token of a chunk, and from there to the other tokens in 32.
"""

import torch
from torch import Tensor

# a stride along time with which 64 tokens, the longest chunk, are within 2^31 numbers of each other
REACH = 2**31 // 64


def unit_stride(x: Tensor) -> Tensor:
    """x [B, T, ..] itself or, where kernels cannot take it so, a contiguous copy."""
    return x if _suits(x) else x.contiguous()


def dense_like(x: Tensor) -> Tensor:
    """A new tensor of x's shape, dense, with batch inside time where x has it so, and the last dimension innermost."""
    if x.stride(-1) == 1:
        like = torch.empty_like(x)
        if _suits(like):
            return like
    return x.new_empty(x.shape)


def _suits(x):
    return x.stride(-1) == 1 and x.stride(1) < REACH
