"""Padding, and sequences that are packed behind each other: where they begin, and the positions of their tokens."""

import torch
from torch import Tensor
from transformers.utils.import_utils import is_tracing


def padding_of(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the part [B, T] of a mask [B, S] for the last T tokens, or None if it has no padding there.

    Outside of traced code this waits for the device. transformers has the same function for its recurrent layers, but
    that function takes a single token for one that was generated, and so never for padding.
    """
    if attention_mask is None:
        return None
    mask = attention_mask[:, -length:]
    return None if not is_tracing(mask) and bool((mask != 0).all()) else mask.contiguous()


def check_packing(position_ids: Tensor | None, cu_seqlens: Tensor | None, given: dict) -> None:
    """Raise an error if the only description of packed sequences is one that HGRN2 layers do not read.

    Args:
        position_ids, cu_seqlens: arguments of the model.
        given: its other arguments, by name.

    Raises:
        ValueError: such an argument stands alone.
    """
    alone = [name for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx") if given.get(name) is not None]
    if alone and position_ids is None and cu_seqlens is None:
        raise ValueError(
            f"{' and '.join(alone)} alone would mix the packed sequences in HGRN2 layers: give position_ids that begin "
            "again at 0 with each sequence (return_position_ids=True of the collator), or cu_seqlens"
        )


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
