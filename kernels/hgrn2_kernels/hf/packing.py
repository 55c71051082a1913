"""Sequences that are packed behind each other: where they begin, and the positions of their tokens."""

import torch
from torch import Tensor


@torch.compiler.disable
def boundaries(positions: Tensor, batch: int) -> Tensor | None:
    """Return the boundaries of packed sequences, or None if each row is one sequence. It waits for the device.

    A sequence begins in each row, and wherever a position does not follow the one before it. transformers finds packed
    sequences for its masks in the same way.

    Args:
        positions: [B or 1, T] int64, position of each token in its sequence.
        batch: number of rows B.

    Returns:
        [N + 1] int32, boundaries in the B * T tokens, row after row.
    """
    positions = positions.expand(batch, -1)
    begins = positions.diff(prepend=positions[:, :1] - 1) != 1
    if not begins.any():
        return None
    begins[:, 0] = True
    starts = begins.flatten().nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([positions.numel()])]).int()


def positions_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """Return the positions [1, T] int64 of the tokens of packed sequences. Tokens after the last boundary count anew.

    Args:
        cu_seqlens: [N + 1] int32, boundaries of the sequences.
        length: number of tokens T.
    """
    tokens = torch.arange(length, device=cu_seqlens.device)
    begins = cu_seqlens.long()[torch.searchsorted(cu_seqlens.long(), tokens, right=True) - 1]
    return (tokens - begins)[None]
