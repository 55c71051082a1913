"""The operator over sequences that are split among context parallel ranks: states are handed on, no token moves.

Megatron cuts a sequence into 2 * cp chunks, of which rank r has numbers r and 2 * cp - 1 - r, one behind the other:
every sequence of a batch by itself, every document of a packed batch by itself ("documents"), or the whole packed
stream, across whose chunks documents then go on ("stream").
"""

import bisect
import dataclasses
import itertools

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

from hgrn2_kernels import Ends, Pieces, chunk_hgrn2_sharded, combine_states
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.requirements import Settings, global_args

DOCUMENTS, STREAM = "documents", "stream"


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
        qfv: [b, s/cp, H, 3, K], raw projections of this rank's tokens.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.

    Returns:
        o: [b, s/cp, H, K], outputs of this rank's tokens.

    Raises:
        ValueError: an odd number of tokens.
    """
    b, s = qfv.shape[:2]
    chunks = qfv.reshape(2 * b, _chunk_size(s), *qfv.shape[2:])
    return chunk_hgrn2_sharded(chunks, lower_bound, Exchange(group)).reshape(b, s, qfv.shape[2], -1)


def chunk_hgrn2_of_packed(
    qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, cu_seqlens: Tensor, layout: str
) -> Tensor:
    """`chunk_hgrn2_fused` of packed sequences of which each rank has its tokens; differentiable.

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
    pieces = pieces_of(cu_seqlens, qfv.shape[1], layout, group.rank(), group.size())
    return chunk_hgrn2_sharded(qfv, lower_bound, Exchange(group), pieces=pieces)


def _chunk_size(num_tokens: int) -> int:
    if num_tokens % 2:
        raise ValueError(
            f"{num_tokens} tokens a context parallel rank are no two chunks: make --seq-length a multiple of 2 * cp"
        )
    return num_tokens // 2


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Hands states on among the ranks of a group: the `hand_on` of `chunk_hgrn2_sharded`.

    A state's channels of K go their ways apart, so each rank takes a share of them, of every piece on every rank,
    follows these through the chunks and sends back what enters each: two all-to-alls. A rank sends, of each piece,
    H * K * (2 V + 1) numbers at most, however many ranks there are; gathering every state on every rank would take
    H * K * (V + 1) from each of the others. In fp32, decays as logs.

    Attributes:
        group: the context parallel ranks.
    """

    group: ProcessGroup

    def __call__(self, state: Tensor, log_decay: Tensor, reverse: bool):
        """Start the exchange; see `chunk_hgrn2_sharded`.

        Args:
            state: [2 n, H, K, V] of two pieces of each of n sequences, the same n on every rank.
            log_decay: [2 n, H, K].
            reverse: whether gradients go backwards in time.
        """
        cp, (pieces, H, K, V) = self.group.size(), state.shape
        own = torch.cat([state, log_decay[..., None]], -1).flatten(1, 2)
        share = -(-H * K // cp)
        if own.shape[1] < share * cp:
            own = torch.nn.functional.pad(own, (0, 0, 0, share * cp - own.shape[1]))
        # [cp, 2 n, share, V + 1]
        sent = own.unflatten(1, (cp, share)).transpose(0, 1).contiguous()

        def exchange() -> Tensor:
            first, second = self._all_to_all(sent).unflatten(1, (-1, 2)).unbind(2)
            in_order = torch.cat([first, second.flip(0)])
            in_order = in_order.flip(0) if reverse else in_order
            entering, _ = combine_states(in_order[..., None, :, :-1], in_order[..., None, :, -1])
            entering = entering.flip(0) if reverse else entering
            first, second = entering[:, :, 0].chunk(2)
            back = self._all_to_all(torch.stack([first, second.flip(0)], 2).flatten(1, 2))
            return back.transpose(0, 1).flatten(1, 2)[:, : H * K].reshape(pieces, H, K, V)

        return _beside(exchange, sent)

    def _all_to_all(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        torch.distributed.all_to_all_single(received, x, group=self.group)
        return received


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _beside(work, sent: Tensor):
    """Start `work`, which reads `sent`, beside what the GPU does next; returns a function that waits for its result."""
    if not sent.is_cuda:
        return work
    stream = _streams.get(sent.device) or _streams.setdefault(sent.device, torch.cuda.Stream(sent.device))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    sent.record_stream(stream)

    def wait() -> Tensor:
        torch.cuda.current_stream().wait_stream(stream)
        result.record_stream(torch.cuda.current_stream())
        return result

    return wait


# of the batch at hand, every layer of which asks for the same
_kept = WeakTensorKeyDictionary()


def pieces_of(cu_seqlens: Tensor, num_tokens: int, layout: str, rank: int, cp: int) -> Pieces:
    """How the `num_tokens` of context parallel rank `rank` are pieces of packed sequences; see above."""
    made = _kept.setdefault(cu_seqlens, {})
    key = num_tokens, layout, rank, cp
    if key not in made:
        borders = cu_seqlens.tolist()
        make = _of_documents if layout == DOCUMENTS else _of_stream
        made[key] = make(borders, num_tokens, rank, cp, cu_seqlens.device)
    return made[key]


def _ints(numbers, device, dtype=torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _of_documents(borders: list[int], num_tokens: int, rank: int, cp: int, device) -> Pieces:
    lengths = [end - start for start, end in itertools.pairwise(borders) if end > start]
    for length in lengths:
        if length % (2 * cp):
            raise ValueError(
                f"a packed sequence of {length} tokens is not cut into 2 * {cp} chunks: pad each to a multiple of "
                "2 * cp, or deal out the whole stream (--dataloader-inter-document-masking)"
            )
    local = [0, *itertools.accumulate(length // (2 * cp) for length in lengths for _ in range(2))]
    count = len(local) - 1
    rows = list(range(count))
    if local[-1] < num_tokens:  # nobody's
        local.append(num_tokens)
        rows.append(-1)
    ends = _ints(rows, device)
    return Pieces(_ints(local, device), ends, ends, count)


def _of_stream(borders: list[int], num_tokens: int, rank: int, cp: int, device) -> Pieces:
    size = _chunk_size(num_tokens)
    # what lies behind the last sequence is one more
    borders = sorted({*borders, 2 * cp * size})
    local, entered, left = [0], [], []
    tails, heads = [0], [0]
    stops_forward, stops_backward = [], []
    for piece, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        start, end, behind = chunk * size, (chunk + 1) * size, piece * size
        # borders inside, and those at the chunk's own ends
        inside = borders[bisect.bisect_right(borders, start) : bisect.bisect_left(borders, end)]
        begins, ends = start in borders, end in borders
        local += [x - start + behind for x in (*inside, end)]
        entered += [-1 if begins else piece, *[-1] * len(inside)]
        left += [*[-1] * len(inside), -1 if ends else piece]
        tails += [(inside[-1] if inside else start) - start + behind, behind + size]
        heads += [(inside[0] if inside else end) - start + behind, behind + size]
        if inside or begins:
            stops_forward.append(piece)
        if inside or ends:
            stops_backward.append(piece)
    return Pieces(
        cu_seqlens=_ints(local, device),
        entered=_ints(entered, device),
        left=_ints(left, device),
        count=2,
        tails=Ends(_ints(tails, device), _ints([1, 3], device, torch.int64), stops_forward),
        heads=Ends(_ints(heads, device), _ints([0, 2], device, torch.int64), stops_backward),
    )
