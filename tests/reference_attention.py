"""A plain reference for what needs Transformer Engine: attention over context parallel ranks, and their tokens.

Slow and simple: every rank gathers all keys and values, knows the place of every token, and masks.
"""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor


def own_tokens(num_tokens: int, borders: list[int] | None, layout: str | None, rank: int, cp: int) -> Tensor:
    """Places of a context parallel rank's tokens among all, as Megatron deals them out.

    Args:
        num_tokens: of all ranks.
        borders: of packed sequences, or None.
        layout: of packed sequences, "documents" or "stream".
    """
    if borders is None or layout == "stream":
        borders = [0, num_tokens]
    chunks = [
        chunk
        for start, end in zip(borders, borders[1:], strict=False)
        for n, chunk in enumerate(torch.arange(start, end).chunk(2 * cp))
        if n in (rank, 2 * cp - 1 - rank)
    ]
    # of each sequence the earlier of the two chunks comes first
    return torch.cat(chunks)


class ReferenceAttention(torch.nn.Module):
    """Takes the place of the core attention of Megatron's own layers; dense or packed, with one query a key."""

    def __init__(self, config, layer_number, pg_collection=None, **ignored):
        super().__init__()
        self.cp_group = pg_collection.cp
        self.layout = getattr(config, "hgrn2_packed_layout", None)

    def forward(self, query, key, value, attention_mask, packed_seq_params=None, **ignored):
        """query, key, value: [s, b, heads, dim], or [t, heads, dim] of packed sequences."""
        shape, cp, rank = query.shape, self.cp_group.size(), self.cp_group.rank()
        query, key, value = (x.view(x.shape[0], -1, *x.shape[-2:]) for x in (query, key, value))
        total = cp * len(query)
        p = packed_seq_params
        borders = (
            None if p is None else (p.cu_seqlens_q_padded if p.cu_seqlens_q_padded is not None else p.cu_seqlens_q)
        )
        borders = None if borders is None else borders.tolist()
        places = [own_tokens(total, borders, self.layout, r, cp) for r in range(cp)]
        if cp > 1:
            key, value = (gather_from_sequence_parallel_region(x, group=self.cp_group) for x in (key, value))
        own, all_places = places[rank], torch.cat(places)
        sequence = (
            torch.zeros(total)
            if borders is None
            else torch.bucketize(torch.arange(total), torch.tensor(borders), right=True)
        )
        sees = (all_places[None] <= own[:, None]) & (sequence[all_places][None] == sequence[own][:, None])
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * shape[-1] ** -0.5
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        o = torch.einsum("bhqk,kbhd->qbhd", weights, value)
        return o.flatten(2) if len(shape) == 4 else o.flatten(1)
