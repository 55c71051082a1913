"""Draw sequences of bytes that hide needles in filler text, on the device that trains on them.

A needle is a line with a key and a value, such as `[rokq=vbtazw]`. At the end of a sequence stand questions, one for
each needle in a random order: the key once more, and then the value, which the model has to give byte by byte. The
values are in the sequence too, so a model that gives all bytes of a value would also write the value by itself.
"""

import dataclasses
import random
from pathlib import Path

import torch
from batches import Batch
from torch import Tensor

BEFORE, BETWEEN, AFTER = (list(part) for part in (b"\n[", b"=", b"]\n"))
LETTERS = torch.arange(ord("a"), ord("z") + 1)
# The share of the files that only held-out sequences take filler from.
HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a sequence.

    Attributes:
        length: bytes in the sequence.
        needles: number of needles.
        key: letters of a key.
        value: letters of a value.
        others: random places in the text before the questions where the next byte is asked for too.

    Raises:
        ValueError: the sequence is too short.
    """

    length: int
    needles: int
    key: int
    value: int
    others: int

    def __post_init__(self):
        if self.filler < 1:
            raise ValueError(
                f"a sequence of {self.length} bytes has no room for {self.needles} needles and their questions: "
                f"give at least {self.length - self.filler + 1}"
            )

    @property
    def needle(self) -> int:
        """Bytes of a needle."""
        return len(BEFORE) + self.key + len(BETWEEN) + self.value + len(AFTER)

    @property
    def filler(self) -> int:
        """Bytes of filler text. A question is as long as a needle."""
        return self.length - 2 * self.needles * self.needle


def sequences(
    layout: Layout, count: int, text: Tensor, generator: torch.Generator, depth: float | None = None
) -> Batch:
    """Draw `count` sequences on the generator's device.

    Args:
        layout: the parts of a sequence.
        count: number of sequences.
        text: the filler text, uint8 on the generator's device.
        generator: draws everything.
        depth: place of the needle that the first question asks for, from 0 (the first bytes of the filler) to 1 (its
            last bytes). The other needles have random places. With None all have.

    Returns:
        The sequences. Their queries are the bytes before each byte of a value, question after question, and then the
        other places.

    Raises:
        ValueError: the text is shorter than the filler of one sequence.
    """
    device, needles, filler = generator.device, layout.needles, layout.filler
    if len(text) <= filler:
        raise ValueError(f"the text has {len(text)} bytes, but a sequence takes more than {filler}: give a longer one")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator, device=device)

    letters = LETTERS.to(device)
    lines = torch.cat(
        [
            _repeated(BEFORE, count, needles, device),
            letters[draw(len(LETTERS), needles, layout.key)],
            _repeated(BETWEEN, count, needles, device),
            letters[draw(len(LETTERS), needles, layout.value)],
            _repeated(AFTER, count, needles, device),
        ],
        dim=-1,
    )
    # The bytes of filler before each needle. The questions come in the order of `lines`.
    places = draw(filler + 1, needles)
    if depth is not None:
        places[:, 0] = round(depth * filler)
    places, order = places.sort(dim=1, stable=True)
    starts = places + layout.needle * torch.arange(needles, device=device)
    position = torch.arange(filler + needles * layout.needle, device=device).expand(count, -1)
    # The needles that begin at or before a position
    begun = torch.searchsorted(starts, position.contiguous(), right=True)
    index = draw(len(text) - filler, 1) + (position - layout.needle * begun).clamp(min=0)
    body = text[index].long()
    inside = (starts.unsqueeze(-1) + torch.arange(layout.needle, device=device)).flatten(1)
    hidden = lines.gather(1, order.unsqueeze(-1).expand_as(lines))
    body.scatter_(1, inside, hidden.flatten(1))
    tokens = torch.cat([body, lines.flatten(1)], dim=1)
    first = len(BEFORE) + layout.key + len(BETWEEN) - 1
    question = body.shape[1] + layout.needle * torch.arange(needles, device=device).unsqueeze(-1)
    queries = (question + first + torch.arange(layout.value, device=device)).flatten().expand(count, -1)
    queries = torch.cat([queries, draw(body.shape[1], layout.others)], dim=1)
    return Batch(tokens, queries, tokens.gather(1, queries + 1))


def _repeated(part: list[int], count: int, needles: int, device: torch.device) -> Tensor:
    return torch.tensor(part, device=device).expand(count, needles, -1)


def read(path: Path, limit: int) -> tuple[Tensor, Tensor]:
    """Return the filler text for the training and for held-out sequences, uint8 on the CPU.

    Args:
        path: a text file, or a folder whose Python files are read. Of a single file, the last tenth is held out.
        limit: most bytes to read. The files of a folder come in a random order, which is always the same.

    Raises:
        ValueError: there is no text.
    """
    if path.is_dir():
        # Installed packages differ from machine to machine.
        files = sorted(file for file in path.rglob("*.py") if not file.parts[len(path.parts)].endswith("-packages"))
        random.Random(0).shuffle(files)
        parts, size = [], 0
        for file in files:
            parts.append(file.read_bytes())
            size += len(parts[-1])
            if size >= limit:
                break
        cut = len(parts) - round(HELD_OUT_SHARE * len(parts))
        both = b"".join(parts[:cut]), b"".join(parts[cut:])
    else:
        data = path.read_bytes()[:limit]
        cut = len(data) - round(HELD_OUT_SHARE * len(data))
        both = data[:cut], data[cut:]
    if not all(both):
        raise ValueError(f"--text {path} has too little text: name a longer text file, or a folder of Python files")
    train, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in both)
    return train, held_out
