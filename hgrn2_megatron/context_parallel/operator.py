"""The HGRN2 operator over sequences that are split over context-parallel ranks.

The ranks exchange states, and tokens stay where they are. Only short documents, whose states are larger than their
tokens, are gathered on one rank each.

Megatron cuts a sequence into 2 * cp chunks. Rank r holds chunks r and 2 * cp - 1 - r, the first followed by the second.
There are three layouts. In a batch, each sequence is cut by itself. In the packed layout "documents", each document is
cut by itself. In the packed layout "stream", the whole packed row is cut, and a document may span several chunks.
"""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from hgrn2_kernels import Pieces, chunk_hgrn2_fused, chunk_hgrn2_sharded
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.context_parallel.exchange import Exchange, chunk_hgrn2_of_gathered, permute
from hgrn2_megatron.context_parallel.pieces import DOCUMENTS, STREAM, chunk_size, plan_tokens
from hgrn2_megatron.settings import Settings, global_args


def packed_layout(config: TransformerConfig) -> str | None:
    """Return the layout in which packed sequences are split over context-parallel ranks.

    PackedSeqParams does not tell the layout. It comes from `hgrn2_packed_layout` of the config, or else from Megatron's
    command line.

    Returns:
        "documents", "stream", or None if neither the config nor the command line tells it.

    Raises:
        UsageError: `hgrn2_packed_layout` has another value.
    """
    settings = Settings(config, global_args())
    given = settings.hgrn2_packed_layout
    if given not in (None, DOCUMENTS, STREAM):
        raise UsageError(f'hgrn2_packed_layout must be "{DOCUMENTS}" or "{STREAM}", got {given!r}')
    if given or settings.sft:
        return given or DOCUMENTS
    return STREAM if settings.dataloader_inter_document_masking else None


def chunk_hgrn2_of_batch(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup) -> Tensor:
    """Apply `chunk_hgrn2_fused` to a batch of which each rank holds two chunks of every sequence; differentiable.

    Args:
        qfv: [b, s/cp, H, 3, K] raw projections of this rank's tokens. A memory order of [s/cp, b, ...] avoids a copy.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.

    Returns:
        o: [b, s/cp, H, K] outputs of this rank's tokens, dtype of qfv, in the memory order [s/cp, b, ...].

    Raises:
        ValueError: the number of tokens per rank is odd.
    """
    b, s, H, _, K = qfv.shape
    # The batch becomes additional heads of two chunks. This is a view, and [2 b, s/cp/2, H, 3, K] would be a copy.
    chunks = qfv.transpose(0, 1).reshape(2, chunk_size(s), b * H, 3, K)
    bounds = None if lower_bound is None else lower_bound.repeat(b, 1)
    return chunk_hgrn2_sharded(chunks, bounds, Exchange(group)).reshape(s, b, H, K).transpose(0, 1)


def chunk_hgrn2_of_packed(
    qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, cu_seqlens: Tensor, layout: str
) -> Tensor:
    """Apply `chunk_hgrn2_fused` to packed sequences that are split over ranks; differentiable.

    The ranks exchange the states of a document. If a document has so few tokens per rank that its states would be
    larger, the document is gathered on one rank instead, and its outputs are sent back. So no number of documents makes
    the ranks send more than the tokens themselves take.

    Args:
        qfv: [1, t/cp, H, 3, K] raw projections of this rank's tokens.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.
        cu_seqlens: [n + 1] int32 boundaries of the sequences with their padding, counted over the tokens of all ranks.
            They are read on the host, once for all layers.
        layout: "documents" or "stream".

    Returns:
        o: [1, t/cp, H, K] outputs of this rank's tokens, dtype of qfv.

    Raises:
        ValueError: a document, or the whole stream, cannot be cut into 2 * cp equal chunks.
    """
    plan = plan_tokens(cu_seqlens, qfv.shape[1], layout, group.rank(), group.size(), state_cost(qfv))
    gather = plan.gather
    if gather is None:
        assert plan.pieces is not None, "a plan that gathers nothing has pieces"
        return _chunk_hgrn2_of_pieces(qfv, lower_bound, group, plan.pieces)
    qfv = permute(qfv, gather.split, gather.unsplit)
    local, gathered = qfv[:, : plan.num_local], qfv[:, plan.num_local :]
    outputs = [] if plan.pieces is None else [_chunk_hgrn2_of_pieces(local, lower_bound, group, plan.pieces)]
    outputs.append(chunk_hgrn2_of_gathered(gathered, lower_bound, group, gather))
    return permute(torch.cat(outputs, 1), gather.unsplit, gather.split)


def _chunk_hgrn2_of_pieces(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, pieces: Pieces) -> Tensor:
    if not pieces.count:
        return chunk_hgrn2_fused(qfv, lower_bound, cu_seqlens=pieces.cu_seqlens)[0]
    return chunk_hgrn2_sharded(qfv, lower_bound, Exchange(group), pieces=pieces)


def state_cost(qfv: Tensor) -> float:
    """Return the number of tokens per rank that take as many bytes to send as the states of one sequence.

    A token sends q, f and v, and its output comes back: 4 * H * K numbers of the dtype of qfv [..., H, 3, K]. A
    sequence has two pieces per rank, and each piece sends H * K * (2 K + 1) fp32 numbers.
    """
    return 2 * (2 * qfv.shape[-1] + 1) * 4 / (4 * qfv.element_size())
