"""The operator over sequences that are split among context parallel ranks: states are handed on, and no token moves but
those of short documents.

Megatron cuts a sequence into 2 * cp chunks, of which rank r has numbers r and 2 * cp - 1 - r, one behind the other:
every sequence of a batch by itself, every document of a packed batch by itself ("documents"), or the whole packed
stream, across whose chunks documents then go on ("stream").
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from hgrn2_kernels import Pieces, chunk_hgrn2_fused, chunk_hgrn2_sharded
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.context_parallel.exchange import Exchange, chunk_hgrn2_of_moved, permute
from hgrn2_megatron.context_parallel.pieces import DOCUMENTS, STREAM, chunk_size, deal_of
from hgrn2_megatron.settings import Settings, global_args


def packed_layout(config: TransformerConfig) -> str | None:
    """How packed sequences are dealt out: as the config's `hgrn2_packed_layout` says, or Megatron's command line.

    Returns:
        "documents", "stream", or None where neither says: PackedSeqParams does not.
    """
    settings = Settings(config, global_args())
    given = settings.hgrn2_packed_layout
    if given not in (None, DOCUMENTS, STREAM):
        raise UsageError(f"hgrn2_packed_layout must be {DOCUMENTS} or {STREAM}, got {given!r}")
    if given or settings.sft:
        return given or DOCUMENTS
    return STREAM if settings.dataloader_inter_document_masking else None


def chunk_hgrn2_of_batch(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup) -> Tensor:
    """`chunk_hgrn2_fused` of whole sequences of which each rank has two chunks; differentiable.

    Args:
        qfv: [b, s/cp, H, 3, K], raw projections of this rank's tokens, best with the batch inside time in memory.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.

    Returns:
        o: [b, s/cp, H, K], outputs of this rank's tokens, with the batch inside time in memory.

    Raises:
        ValueError: an odd number of tokens.
    """
    b, s, H, _, K = qfv.shape
    # the chunks of a batch of one, whose heads are those of all sequences: a view, where [2 b, s/cp/2] would be a copy
    chunks = qfv.transpose(0, 1).reshape(2, chunk_size(s), b * H, 3, K)
    bounds = None if lower_bound is None else lower_bound.repeat(b, 1)
    return chunk_hgrn2_sharded(chunks, bounds, Exchange(group)).reshape(s, b, H, K).transpose(0, 1)


def chunk_hgrn2_of_packed(
    qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, cu_seqlens: Tensor, layout: str
) -> Tensor:
    """`chunk_hgrn2_fused` of packed sequences of which each rank has its tokens; differentiable.

    States are handed on, or, where a rank has so few tokens of a document that they are less, all of these go to one
    rank and the outputs come back: however many documents there are, no more is sent than the tokens are.

    Args:
        qfv: [1, t/cp, H, 3, K], raw projections of this rank's tokens.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.
        cu_seqlens: [n + 1] int32, borders of the sequences with their padding, over all ranks' tokens; read on the
            host, once for all layers.
        layout: "documents" or "stream".

    Returns:
        o: [1, t/cp, H, K], outputs of this rank's tokens.

    Raises:
        ValueError: sequences or a stream that are not cut into 2 * cp chunks.
    """
    deal = deal_of(cu_seqlens, qfv.shape[1], layout, group.rank(), group.size(), state_cost(qfv))
    moves = deal.moves
    if moves is None:
        assert deal.pieces is not None, "all tokens stay"
        return _staying(qfv, lower_bound, group, deal.pieces)
    qfv = permute(qfv, moves.apart, moves.together)
    stay, move = qfv[:, : deal.num_stay], qfv[:, deal.num_stay :]
    outputs = [] if deal.pieces is None else [_staying(stay, lower_bound, group, deal.pieces)]
    outputs.append(chunk_hgrn2_of_moved(move, lower_bound, group, moves))
    return permute(torch.cat(outputs, 1), moves.together, moves.apart)


def _staying(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, pieces: Pieces) -> Tensor:
    if not pieces.count:
        return chunk_hgrn2_fused(qfv, lower_bound, cu_seqlens=pieces.cu_seqlens)[0]
    return chunk_hgrn2_sharded(qfv, lower_bound, Exchange(group), pieces=pieces)


def state_cost(qfv: Tensor) -> float:
    """How many tokens of [.., H, 3, K] take, to another rank and their outputs back, as many bytes as the states of a
    sequence, two pieces of H * K * (2 K + 1) fp32 numbers."""
    return 2 * (2 * qfv.shape[-1] + 1) * 4 / (4 * qfv.element_size())
