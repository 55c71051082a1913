"""The constant matrices that the chunk kernels multiply by. They are made once per device and chunk size.

A program loads them faster than it could make them. If x [D, C] is a tile of channels and tokens, the product of x
and a matrix is a sum over tokens.
"""

import functools

import torch
from torch import Tensor

from hgrn2_kernels.triton_math import UNIT


@functools.cache
def matrices(device: torch.device, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the matrices for chunks of C tokens, a power of two.

    Args:
        dtype: dtype of the operands of the kernels' products, bf16 or fp32.

    Returns:
        sums: [log2(C) + 3, C, C] fp16 (fp32 if dtype is fp32), for log gates. An entry is 0 or plus or minus one unit.
            Matrix 0 gives the decay between the middle of the chunk and token j, positive before the middle. The
            middle is where half of the decay has passed. Matrix n, for blocks of 2^n tokens, gives the decay between
            token j and the last token of the first half of its block, negative on both sides. The last but one gives
            the decay through token j, and the last one the decay after it.
        ones: [5, C, C] dtype: the identity twice, the sum from token j on, the sum before it, and the sum of all.
    """
    token = torch.arange(C, device=device)
    i, j = token[:, None], token[None, :]
    levels = C.bit_length() - 1
    sums = [(i <= j).float() - 0.5, *(_between_halves(i, j, n) for n in range(1, levels + 1)), i <= j, i > j]
    ones = [i == j, i == j, i >= j, i < j, torch.ones_like(i == j)]
    narrow, unit = (torch.float32, 1.0) if dtype == torch.float32 else (torch.float16, 1 / UNIT.value)
    return torch.stack([x.float() * unit for x in sums]).to(narrow), torch.stack(ones).to(dtype)


def _between_halves(i, j, n):
    ref = (j >> n << n) + (1 << n - 1) - 1
    return ((i > ref) & (i <= j)) | ((i > j) & (i <= ref))
