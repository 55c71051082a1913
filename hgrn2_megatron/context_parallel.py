"""The operator over sequences that are split among context parallel ranks: the state is handed on, no token moves."""

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused, combine_states, segment_states


def chunk_hgrn2_of_shards(qfv: Tensor, lower_bound: Tensor | None, cp_group: torch.distributed.ProcessGroup) -> Tensor:
    """`chunk_hgrn2_fused` of whole sequences of which each rank has its shard; differentiable.

    A sequence is cut into 2 * cp segments, of which rank r has numbers r and 2 * cp - 1 - r, one behind the other, as
    Megatron deals them out for attention. Each rank sums up its two by what they do to a state that enters them; one
    all-gather of H * K * (V + 1) fp32 numbers a segment, whatever its length, and each rank finds what enters its own.

    Args:
        qfv: [b, s/cp, H, 3, K], raw projections of this rank's tokens.
        lower_bound: [H, K] fp32, or None.
        cp_group: ranks that share the sequences.

    Returns:
        o: [b, s/cp, H, K], outputs of this rank's tokens.

    Raises:
        ValueError: an odd number of tokens.
    """
    (b, s), cp, rank = qfv.shape[:2], cp_group.size(), cp_group.rank()
    if s % 2:
        raise ValueError(
            f"{s} tokens a context parallel rank are no two segments: make --seq-length a multiple of 2 * cp"
        )
    segments = qfv.reshape(2 * b, s // 2, *qfv.shape[2:])
    _, f, v = segments.unbind(-2)
    state, log_decay = segment_states(f, v, lower_bound)
    own = torch.cat([state, log_decay[..., None]], -1)
    first, second = gather_from_sequence_parallel_region(own, group=cp_group).unflatten(0, (cp, b, 2)).unbind(2)
    in_order = torch.cat([first, second.flip(0)])
    entering, _ = combine_states(in_order[..., :-1], in_order[..., -1])
    entering = torch.stack([entering[rank], entering[2 * cp - 1 - rank]], 1).flatten(0, 1)
    o, _ = chunk_hgrn2_fused(segments, lower_bound, initial_state=entering)
    return o.reshape(b, s, *o.shape[2:])
