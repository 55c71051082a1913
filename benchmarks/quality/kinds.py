"""The small models that are compared: what mixes their tokens, and how wide they are."""

import dataclasses

LAYERS = 2
EXPANDS = (16, 32, 64, 128)
PATTERNS = ("*", "H*", "H")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model's size and what mixes its tokens.

    Attributes:
        pattern: H (HGRN2) and * (attention), repeated over the layers.
        width: hidden size; the GLU is twice as wide.
        expand: expand ratio of HGRN2 layers, 0 where there are none.
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
        """Numbers of a sequence's state in HGRN2 layers."""
        layers = (self.pattern * LAYERS)[:LAYERS].count("H")
        return layers * self.width * self.expand


def kinds(
    widths: tuple[int, ...], expands: tuple[int, ...] = EXPANDS, patterns: tuple[str, ...] = PATTERNS
) -> list[Kind]:
    """The models of the table, by width: attention, the hybrid with the largest expand ratio, HGRN2 with each.

    Raises:
        ValueError: a width that no expand ratio divides.
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
