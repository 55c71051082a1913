"""Plan which of a context-parallel rank's packed sequences exchange states, and which are gathered on one rank.

A piece is a part of a sequence on one rank. The sequence continues before or after the piece on another rank. A rank's
two chunks of a sequence are two pieces.
"""

import bisect
import dataclasses
import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hgrn2_kernels import Ends, Pieces

DOCUMENTS, STREAM = "documents", "stream"


@dataclasses.dataclass(frozen=True)
class GatherPlan:
    """Plan for documents that are gathered as a whole, each on one rank.

    Attributes:
        split: [t/cp] int64, permutation of this rank's tokens that puts local tokens before tokens to send.
        unsplit: [t/cp] int64, inverse of `split`.
        sizes: number of tokens that each rank sends to rank 0, 1, ... It is the same for every sender.
        order: [cp * sizes[own rank]] int64, permutation of the tokens that arrive. They arrive in the order of the
            ranks that sent them, and the permutation puts them in the order of the whole documents.
        inverse: [cp * sizes[own rank]] int64, inverse of `order`.
        cu_seqlens: [n + 1] int32, boundaries of the documents that are gathered on this rank.
    """

    split: Tensor
    unsplit: Tensor
    sizes: list[int]
    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor


@dataclasses.dataclass(frozen=True)
class TokenPlan:
    """Plan for a rank's tokens of packed sequences.

    Attributes:
        num_local: number of tokens that stay on this rank.
        pieces: pieces that the local tokens consist of, or None if no token stays.
        gather: plan for the other tokens, or None if all tokens stay.
    """

    num_local: int
    pieces: Pieces | None
    gather: GatherPlan | None = None


# Plans for the boundaries that are in use. All layers of a model ask for the same ones.
_plans = WeakTensorKeyDictionary()


def plan_tokens(cu_seqlens: Tensor, num_tokens: int, layout: str, rank: int, cp: int, state_cost: float) -> TokenPlan:
    """Return the plan for the tokens of packed sequences that one context-parallel rank holds.

    Args:
        cu_seqlens: [n + 1] int32 boundaries of the sequences with their padding, counted over the tokens of all ranks.
            They are read on the host, once for all layers. A tensor made under torch.inference_mode is read by every
            layer.
        num_tokens: number of tokens on this rank.
        layout: "documents" or "stream".
        rank: the rank, from 0 to cp - 1.
        cp: number of context-parallel ranks.
        state_cost: number of tokens per rank that take as many bytes to send as the states of one sequence. In the
            layout "documents", a document with fewer tokens per rank is gathered on one rank.

    Raises:
        ValueError: a document, or the whole stream, cannot be cut into 2 * cp equal chunks.
    """
    # Writing other boundaries into the same tensor changes its version. Inference tensors have no version.
    version = tuple(cu_seqlens.tolist()) if cu_seqlens.is_inference() else cu_seqlens._version
    if _plans.get(cu_seqlens, (None,))[0] != version:
        _plans[cu_seqlens] = version, {}
    plans = _plans[cu_seqlens][1]
    key = num_tokens, layout, rank, cp, state_cost
    if key not in plans:
        boundaries = cu_seqlens.tolist()
        # Training may use the same plan after an evaluation, and cannot use inference tensors.
        with torch.inference_mode(False):
            if layout == DOCUMENTS:
                plans[key] = _plan_documents(boundaries, num_tokens, rank, cp, state_cost, cu_seqlens.device)
            else:
                plans[key] = TokenPlan(num_tokens, _stream_pieces(boundaries, num_tokens, rank, cp, cu_seqlens.device))
    return plans[key]


def chunk_size(num_tokens: int) -> int:
    """Return the number of tokens in each of a rank's two chunks.

    Raises:
        ValueError: the number of tokens is odd.
    """
    if num_tokens % 2:
        raise ValueError(
            f"a context-parallel rank has {num_tokens} tokens, which cannot be cut into two equal chunks: make "
            "--seq-length a multiple of 2 * cp"
        )
    return num_tokens // 2


def _plan_documents(boundaries: list[int], num_tokens: int, rank: int, cp: int, state_cost: float, device) -> TokenPlan:
    lengths = [end - start for start, end in itertools.pairwise(boundaries) if end > start]
    for length in lengths:
        if length % (2 * cp):
            raise ValueError(
                f"a packed sequence of {length} tokens cannot be cut into 2 * {cp} equal chunks: pad each sequence to "
                "a multiple of 2 * cp tokens, or split the whole stream (--dataloader-inter-document-masking)"
            )
    # number of tokens of each document on a rank, which are its two chunks one after the other
    shares = [length // cp for length in lengths]
    starts = [0, *itertools.accumulate(shares)]
    num_trailing = num_tokens - starts[-1]
    long = [n for n, share in enumerate(shares) if share >= state_cost]
    short = [n for n, share in enumerate(shares) if share < state_cost]

    pieces = None
    num_local = sum(shares[n] for n in long) + num_trailing
    if num_local:
        halves = [shares[n] // 2 for n in long for _ in range(2)]
        rows = list(range(len(halves)))
        if num_trailing:
            # tokens after the last document, which belong to no piece
            halves.append(num_trailing)
            rows.append(-1)
        ends = _ints(rows, device)
        pieces = Pieces(_ints([0, *itertools.accumulate(halves)], device), ends, ends, 2 * len(long))
    if not short:
        return TokenPlan(num_local, pieces)

    owners = _assign_ranks(short, shares, cp)
    places = [range(starts[n], starts[n] + shares[n]) for n in (*long, *itertools.chain(*owners))]
    places.insert(len(long), range(starts[-1], num_tokens))
    split = _ints([place for span in places for place in span], device, torch.int64)
    return TokenPlan(num_local, pieces, _plan_gathering(split, owners, shares, rank, cp))


def _assign_ranks(documents: list[int], shares: list[int], cp: int) -> list[list[int]]:
    """Assign documents to ranks, the longest first. Each goes to the rank with the fewest tokens so far."""
    owners: list[list[int]] = [[] for _ in range(cp)]
    loads = [0] * cp
    for n in sorted(documents, key=lambda n: -shares[n]):
        least = loads.index(min(loads))
        owners[least].append(n)
        loads[least] += shares[n]
    return owners


def _plan_gathering(split: Tensor, owners: list[list[int]], shares: list[int], rank: int, cp: int) -> GatherPlan:
    sizes = [sum(shares[n] for n in documents) for documents in owners]
    order: list[int] = []
    start = 0
    for n in owners[rank]:
        half = shares[n] // 2
        # Chunk c of a document is the first chunk of rank c, or the second chunk of rank 2 * cp - 1 - c.
        firsts = [r * sizes[rank] + start for r in range(cp)]
        for begin in (*firsts, *(begin + half for begin in reversed(firsts))):
            order += range(begin, begin + half)
        start += shares[n]
    lengths = [cp * shares[n] for n in owners[rank]]
    arrived = _ints(order, split.device, torch.int64)
    return GatherPlan(
        split=split,
        unsplit=split.argsort(),
        sizes=sizes,
        order=arrived,
        inverse=arrived.argsort(),
        cu_seqlens=_ints([0, *itertools.accumulate(lengths)], split.device),
    )


def _ints(numbers, device, dtype=torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _stream_pieces(boundaries: list[int], num_tokens: int, rank: int, cp: int, device) -> Pieces:
    size = chunk_size(num_tokens)
    # tokens after the last sequence count as one more sequence
    boundaries = sorted({*boundaries, 2 * cp * size})
    local, entered, left = [0], [], []
    last_tokens, first_tokens = [0], [0]
    stops_forward, stops_backward = [], []
    for piece, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        start, end, offset = chunk * size, (chunk + 1) * size, piece * size
        # boundaries inside the chunk, and at its two ends
        inside = boundaries[bisect.bisect_right(boundaries, start) : bisect.bisect_left(boundaries, end)]
        begins, ends = start in boundaries, end in boundaries
        local += [x - start + offset for x in (*inside, end)]
        entered += [-1 if begins else piece, *[-1] * len(inside)]
        left += [*[-1] * len(inside), -1 if ends else piece]
        last_tokens += [(inside[-1] if inside else start) - start + offset, offset + size]
        first_tokens += [(inside[0] if inside else end) - start + offset, offset + size]
        if inside or begins:
            stops_forward.append(piece)
        if inside or ends:
            stops_backward.append(piece)
    return Pieces(
        cu_seqlens=_ints(local, device),
        entered=_ints(entered, device),
        left=_ints(left, device),
        count=2,
        last_tokens=Ends(_ints(last_tokens, device), _ints([1, 3], device, torch.int64), stops_forward),
        first_tokens=Ends(_ints(first_tokens, device), _ints([0, 2], device, torch.int64), stops_backward),
    )
