"""The constant matrices that the chunk kernels multiply by, made once a device: to load them is cheaper than to make
them in every program.

With x [D, C] a tile of channels and tokens, x matrix is a sum over tokens.
"""

import functools

import torch
from torch import Tensor

from hgrn2_kernels.triton_math import UNIT


@functools.cache
def matrices(device: torch.device, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Matrices for chunks of C tokens, a power of two.

    Args:
        dtype: of the operands of the kernels' products, bf16 or fp32.

    Returns:
        sums: [log2(C) + 3, C, C] fp16 (fp32) for log gates, one unit for 1. Number n up to log2(C) gives the decay
            between token j and the last token of the first half of j's block of 2^n, negative before it; the next
            what comes up to token j, with it, and the last what comes after it.
        ones: [4, C, C] dtype: the identity twice, what comes from token j on, and what comes before it.
    """
    token = torch.arange(C, device=device)
    i, j = token[:, None], token[None, :]
    sums = [_level(i, j, n) for n in range(C.bit_length())] + [i <= j, i > j]
    ones = [i == j, i == j, i >= j, i < j]
    narrow, unit = (torch.float32, 1.0) if dtype == torch.float32 else (torch.float16, 1 / UNIT.value)
    return torch.stack([x.float() * unit for x in sums]).to(narrow), torch.stack(ones).to(dtype)


def _level(i, j, n):
    ref = (j >> n << n) + max(1 << n >> 1, 1) - 1
    return ((i > ref) & (i <= j)).float() - ((i > j) & (i <= ref)).float()
