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
        sums: [log2(C) + 3, C, C] fp16 (fp32) for log gates, one unit for 1. Number 0 gives the decay from the middle of
            the chunk to token j, the middle being where half of the decay is behind, positive before it. Number n, for
            blocks of 2^n tokens, gives the decay between token j and the last token of the first half of its block,
            either way negative. The next is what comes up to token j, with it, and the last what comes after it.
        ones: [5, C, C] dtype: the identity twice, what comes from token j on, what comes before it, and all.
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
