"""Draw sequences of bytes that hide needles in filler text, on the device that trains on them.

A needle is a line `[...]` with a key and a value. Somewhere after it the line comes once more. This is the question:
the model has to give each byte of the value at the byte before it. The values are in the sequence too, so a model that
gives all bytes of a value would also write the value by itself.

The last question stands at the end of the sequence, and its needle anywhere in the filler or at a given depth. The
other questions come after their needles, half of them anywhere and half at a distance whose logarithm is spread evenly.
Without short distances, a model that forgets fast would hardly begin to learn.

The bytes of keys are from 128 to 191, and those of values from 192 to 255. The filler is ASCII, so it has none of them.
Small models do not learn within minutes to find needles that look like the filler.
"""

import dataclasses
import random
from pathlib import Path

import torch
from batches import Batch
from recall import distinct
from torch import Tensor

BEFORE, AFTER = (list(part) for part in (b"\n[", b"]\n"))
KEYS, VALUES, KINDS = 128, 192, 64
NOT_ASCII = bytes(range(128, 256))
# The share of the files that only held-out sequences take filler from.
HELD_OUT_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Layout:
    """The parts of a sequence.

    Attributes:
        length: bytes in the sequence.
        needles: number of needles.
        key: bytes of a key. Its first byte is different in all needles of a sequence.
        value: bytes of a value.

    Raises:
        ValueError: the sequence is too short, or there are more needles than first bytes of keys.
    """

    length: int
    needles: int
    key: int
    value: int

    def __post_init__(self):
        if self.needles > KINDS:
            raise ValueError(f"{self.needles} needles, but keys begin with one of {KINDS} bytes: give at most {KINDS}")
        if self.filler < 1:
            raise ValueError(
                f"a sequence of {self.length} bytes has no room for {self.needles} needles and their questions: "
                f"give at least {self.length - self.filler + 1}"
            )

    @property
    def line(self) -> int:
        """Bytes of a needle, and of a question."""
        return len(BEFORE) + self.key + self.value + len(AFTER)

    @property
    def filler(self) -> int:
        """Bytes of filler text."""
        return self.length - 2 * self.needles * self.line


def sequences(
    layout: Layout, count: int, text: Tensor, generator: torch.Generator, depth: float | None = None
) -> Batch:
    """Draw `count` sequences on the generator's device.

    Args:
        layout: the parts of a sequence.
        count: number of sequences.
        text: the filler text, uint8 on the generator's device.
        generator: draws everything.
        depth: place of the needle that the question at the end asks for, from 0 (before all filler) to 1 (after it).
            With None it is anywhere.

    Returns:
        The sequences. Their queries are the bytes before each byte of a value, question after question. The last ones
        are those of the question at the end.

    Raises:
        ValueError: the text is shorter than the filler of one sequence.
    """
    device, needles, filler = generator.device, layout.needles, layout.filler
    if len(text) <= filler:
        raise ValueError(f"the text has {len(text)} bytes, but a sequence takes more than {filler}: give a longer one")

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, (count, *shape), generator=generator, device=device)

    def share() -> Tensor:
        return torch.rand(count, needles, generator=generator, device=device)

    parts = [
        _repeated(BEFORE, count, needles, device),
        KEYS + distinct(count, KINDS, needles, generator).unsqueeze(-1),
        KEYS + draw(KINDS, needles, layout.key - 1),
        VALUES + draw(KINDS, needles, layout.value),
        _repeated(AFTER, count, needles, device),
    ]
    lines = torch.cat(parts, dim=-1).repeat(1, 2, 1)
    # The bytes of filler before each needle, and then before each question
    places = draw(filler + 1, needles)
    if depth is not None:
        places[:, -1] = round(depth * filler)
    left = filler - places
    far, near = ((left + 1) * share()).long(), (left + 1).pow(share()).long() - 1
    gaps = torch.where(draw(2, needles) == 0, far, near).clamp(max=left)
    gaps[:, -1] = left[:, -1]
    # Lines at the same place stay in this order, so a question comes after its needle.
    places, order = torch.cat([places, places + gaps], dim=1).sort(dim=1, stable=True)
    starts = places + layout.line * torch.arange(2 * needles, device=device)
    position = torch.arange(layout.length, device=device).repeat(count, 1)
    # The lines that begin at or before a position
    begun = torch.searchsorted(starts, position, right=True)
    tokens = text[draw(len(text) - filler, 1) + (position - layout.line * begun).clamp(min=0)].long()
    inside = (starts.unsqueeze(-1) + torch.arange(layout.line, device=device)).flatten(1)
    tokens.scatter_(1, inside, lines.gather(1, order.unsqueeze(-1).expand_as(lines)).flatten(1))
    questions = starts.gather(1, order.argsort(dim=1))[:, needles:]
    before_value = len(BEFORE) + layout.key - 1 + torch.arange(layout.value, device=device)
    queries = (questions.unsqueeze(-1) + before_value).flatten(1)
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
    train, held_out = (torch.frombuffer(bytearray(part.translate(None, NOT_ASCII)), dtype=torch.uint8) for part in both)
    return train, held_out
