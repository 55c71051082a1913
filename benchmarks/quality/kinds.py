"""The small models that mqar.py compares, by mixer and width."""

import dataclasses

LAYERS = 2
EXPANDS = (16, 32, 64, 128)
PATTERNS = ("*", "H*", "H")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model's mixer and size.

    Attributes:
        pattern: the layers' mixers, H for HGRN2 and * for attention. It repeats until all layers have one.
        width: hidden size. The GLU is twice as wide.
        expand: expand ratio of HGRN2 layers, or 0 without such layers.
    """

    pattern: str
    width: int
    expand: int = 0

    @property
    def mixer(self) -> str:
        names = {"*": "attention", "H": "HGRN2"}
        return names.get(self.pattern, f"hybrid {self.pattern}") + (f" {self.expand}" if self.expand else "")

    @property
    def state(self) -> int:
        """The size of a sequence's state in all HGRN2 layers together, in numbers."""
        layers = (self.pattern * LAYERS)[:LAYERS].count("H")
        return layers * self.width * self.expand


def kinds(
    widths: tuple[int, ...], expands: tuple[int, ...] = EXPANDS, patterns: tuple[str, ...] = PATTERNS
) -> list[Kind]:
    """Return the models of the table in the order of widths.

    Each width has attention, a hybrid with the largest expand ratio, and HGRN2 with each expand ratio.

    Raises:
        ValueError: no expand ratio divides a width.
    """
    found = []
    for width in widths:
        fits = [expand for expand in expands if width % expand == 0]
        if not fits:
            raise ValueError(f"--widths {width} is no multiple of any of --expand-ratios {expands}: give one that is")
        of_pattern = {
            "*": [Kind("*", width)],
            "H*": [Kind("H*", width, max(fits))],
            "H": [Kind("H", width, expand) for expand in fits],
        }
        found += [kind for pattern in patterns for kind in of_pattern[pattern]]
    return found
