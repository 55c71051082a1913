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
        sums: [2 log2(C) + 3, C, C] fp16 (fp32) for log gates, one unit for 1. For blocks of 2^n tokens, number n up to
            log2(C) gives the decay from the middle of j's block to token j, the middle being where half of the block's
            decay is behind, positive before it; 0 for blocks of one token. Number log2(C) + n, from n = 1 on, gives
            the decay between token j and the last token of the first half of its block, either way negative. The next
            is what comes up to token j, with it, and the last what comes after it.
        ones: [5, C, C] dtype: the identity twice, what comes from token j on, what comes before it, and all.
    """
    token = torch.arange(C, device=device)
    i, j = token[:, None], token[None, :]
    levels = C.bit_length() - 1
    frames = [_to_middle(i, j, n) for n in range(levels + 1)]
    sums = frames + [_between_halves(i, j, n) for n in range(1, levels + 1)] + [i <= j, i > j]
    ones = [i == j, i == j, i >= j, i < j, torch.ones_like(i == j)]
    narrow, unit = (torch.float32, 1.0) if dtype == torch.float32 else (torch.float16, 1 / UNIT.value)
    return torch.stack([x.float() * unit for x in sums]).to(narrow), torch.stack(ones).to(dtype)


def _to_middle(i, j, n):
    in_block = i >> n == j >> n
    return torch.where(in_block, (i <= j).float() - 0.5, 0.0) if n else torch.zeros_like(i + j, dtype=torch.float32)


def _between_halves(i, j, n):
    ref = (j >> n << n) + (1 << n - 1) - 1
    return ((i > ref) & (i <= j)) | ((i > j) & (i <= ref))
