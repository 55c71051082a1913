"""Which tokens of packed sequences a context parallel rank has, and what it must hear of the others'."""

import bisect
import dataclasses
import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hgrn2_kernels import Ends, Pieces

DOCUMENTS, STREAM = "documents", "stream"


@dataclasses.dataclass(frozen=True)
class Moves:
    """Sequences that go to one rank each, as a whole.

    Attributes:
        apart: [t/cp] int64, places of the rank's tokens, those that stay before those that move.
        together: the inverse.
        sizes: tokens that every rank sends to each rank.
        order: [cp * sizes[own rank]] int64, of the tokens that arrive, which come in the order of the ranks, the places
            of the whole sequences' tokens.
        inverse: of that order.
        cu_seqlens: [n + 1] int32, borders of this rank's whole sequences.
    """

    apart: Tensor
    together: Tensor
    sizes: list[int]
    order: Tensor
    inverse: Tensor
    cu_seqlens: Tensor


@dataclasses.dataclass(frozen=True)
class Deal:
    """What a rank's tokens are.

    Attributes:
        num_stay: tokens that stay.
        pieces: how these are pieces of sequences; None where there are none.
        moves: of the others; None where all stay.
    """

    num_stay: int
    pieces: Pieces | None
    moves: Moves | None = None


# of the batch at hand, every layer of which asks for the same
_kept = WeakTensorKeyDictionary()


def deal_of(cu_seqlens: Tensor, num_tokens: int, layout: str, rank: int, cp: int, state_cost: float) -> Deal:
    """What context parallel rank `rank` does with its tokens of packed sequences.

    Args:
        cu_seqlens: [n + 1] int32, borders of the sequences with their padding, over all ranks' tokens; read on the
            host, once for all layers, or by every layer where they were made under torch.inference_mode.
        num_tokens: of this rank.
        layout: "documents" or "stream".
        state_cost: tokens that are as many bytes as what handing on the states of a sequence takes a rank. Documents of
            which a rank has fewer go to one rank each.

    Raises:
        ValueError: sequences or a stream that are not cut into 2 * cp chunks.
    """
    # whoever writes other borders into the same tensor changes its version, which one of inference mode does not have
    version = tuple(cu_seqlens.tolist()) if cu_seqlens.is_inference() else cu_seqlens._version
    if _kept.get(cu_seqlens, (None,))[0] != version:
        _kept[cu_seqlens] = version, {}
    made = _kept[cu_seqlens][1]
    key = num_tokens, layout, rank, cp, state_cost
    if key not in made:
        borders = cu_seqlens.tolist()
        # training may want the same deal after an evaluation
        with torch.inference_mode(False):
            if layout == DOCUMENTS:
                made[key] = _of_documents(borders, num_tokens, rank, cp, state_cost, cu_seqlens.device)
            else:
                made[key] = Deal(num_tokens, _of_stream(borders, num_tokens, rank, cp, cu_seqlens.device))
    return made[key]


def chunk_size(num_tokens: int) -> int:
    """Tokens of each of a rank's two chunks.

    Raises:
        ValueError: an odd number of tokens.
    """
    if num_tokens % 2:
        raise ValueError(
            f"{num_tokens} tokens a context parallel rank are no two chunks: make --seq-length a multiple of 2 * cp"
        )
    return num_tokens // 2


def _of_documents(borders: list[int], num_tokens: int, rank: int, cp: int, state_cost: float, device) -> Deal:
    lengths = [end - start for start, end in itertools.pairwise(borders) if end > start]
    for length in lengths:
        if length % (2 * cp):
            raise ValueError(
                f"a packed sequence of {length} tokens is not cut into 2 * {cp} chunks: pad each to a multiple of "
                "2 * cp, or deal out the whole stream (--dataloader-inter-document-masking)"
            )
    # a rank's tokens of each document, one chunk behind the other
    shares = [length // cp for length in lengths]
    starts = [0, *itertools.accumulate(shares)]
    behind = num_tokens - starts[-1]
    long = [n for n, share in enumerate(shares) if share >= state_cost]
    short = [n for n, share in enumerate(shares) if share < state_cost]

    pieces = None
    num_stay = sum(shares[n] for n in long) + behind
    if num_stay:
        halves = [shares[n] // 2 for n in long for _ in range(2)]
        rows = list(range(len(halves)))
        if behind:  # nobody's
            halves.append(behind)
            rows.append(-1)
        ends = _ints(rows, device)
        pieces = Pieces(_ints([0, *itertools.accumulate(halves)], device), ends, ends, 2 * len(long))
    if not short:
        return Deal(num_stay, pieces)

    owners = _owners(short, shares, cp)
    places = [range(starts[n], starts[n] + shares[n]) for n in (*long, *itertools.chain(*owners))]
    places.insert(len(long), range(starts[-1], num_tokens))
    apart = _ints([place for span in places for place in span], device, torch.int64)
    return Deal(num_stay, pieces, _moves(apart, owners, shares, rank, cp))


def _owners(documents: list[int], shares: list[int], cp: int) -> list[list[int]]:
    """Documents for each rank: from the longest on, each goes where there is least so far."""
    owners: list[list[int]] = [[] for _ in range(cp)]
    loads = [0] * cp
    for n in sorted(documents, key=lambda n: -shares[n]):
        least = loads.index(min(loads))
        owners[least].append(n)
        loads[least] += shares[n]
    return owners


def _moves(apart: Tensor, owners: list[list[int]], shares: list[int], rank: int, cp: int) -> Moves:
    sizes = [sum(shares[n] for n in documents) for documents in owners]
    order: list[int] = []
    start = 0
    for n in owners[rank]:
        half = shares[n] // 2
        # chunk c is the first of rank c, or the second of rank 2 * cp - 1 - c
        firsts = [r * sizes[rank] + start for r in range(cp)]
        for begin in (*firsts, *(begin + half for begin in reversed(firsts))):
            order += range(begin, begin + half)
        start += shares[n]
    lengths = [cp * shares[n] for n in owners[rank]]
    arrived = _ints(order, apart.device, torch.int64)
    return Moves(
        apart=apart,
        together=apart.argsort(),
        sizes=sizes,
        order=arrived,
        inverse=arrived.argsort(),
        cu_seqlens=_ints([0, *itertools.accumulate(lengths)], apart.device),
    )


def _ints(numbers, device, dtype=torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def _of_stream(borders: list[int], num_tokens: int, rank: int, cp: int, device) -> Pieces:
    size = chunk_size(num_tokens)
    # what lies behind the last sequence is one more
    borders = sorted({*borders, 2 * cp * size})
    local, entered, left = [0], [], []
    last_tokens, first_tokens = [0], [0]
    stops_forward, stops_backward = [], []
    for piece, chunk in enumerate((rank, 2 * cp - 1 - rank)):
        start, end, behind = chunk * size, (chunk + 1) * size, piece * size
        # borders inside, and those at the chunk's own ends
        inside = borders[bisect.bisect_right(borders, start) : bisect.bisect_left(borders, end)]
        begins, ends = start in borders, end in borders
        local += [x - start + behind for x in (*inside, end)]
        entered += [-1 if begins else piece, *[-1] * len(inside)]
        left += [*[-1] * len(inside), -1 if ends else piece]
        last_tokens += [(inside[-1] if inside else start) - start + behind, behind + size]
        first_tokens += [(inside[0] if inside else end) - start + behind, behind + size]
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
