"""The small models that mqar.py, needle.py and state_tracking.py compare, by mixer and size."""

import argparse
import dataclasses

EXPANDS = (16, 32, 64, 128)
PATTERNS = ("*", "H*", "H")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model's mixer and size.

    Attributes:
        pattern: the layers' mixers, H for HGRN2 and * for attention. It repeats until all layers have one.
        width: hidden size. The GLU is twice as wide.
        expand: expand ratio of HGRN2 layers, or 0 without such layers.
        layers: number of layers.
        positions: attention layers have rotary positions. HGRN2 layers never have any.
    """

    pattern: str
    width: int
    expand: int = 0
    layers: int = 2
    positions: bool = True

    @property
    def mixer(self) -> str:
        names = {"*": "attention", "H": "HGRN2"}
        name = names.get(self.pattern, f"hybrid {self.pattern}") + (f" {self.expand}" if self.expand else "")
        return name if self.positions or "*" not in self.pattern else f"{name} without positions"

    @property
    def state(self) -> int:
        """The size of a sequence's state in all HGRN2 layers together, in numbers."""
        layers = (self.pattern * self.layers)[: self.layers].count("H")
        return layers * self.width * self.expand


def kinds(
    widths: tuple[int, ...], expands: tuple[int, ...] = EXPANDS, patterns: tuple[str, ...] = PATTERNS
) -> list[Kind]:
    """Return the models of mqar.py in the order of widths.

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


def _named_kinds(width: int, expand: int, layers: int) -> dict[str, Kind]:
    """Return the models of needle.py and state_tracking.py by the names that --models takes."""
    return {
        "attention": Kind("*", width, 0, layers),
        "hgrn2": Kind("H", width, expand, layers),
        "hybrid": Kind("HHH*", width, expand, layers),
        "hybrid-without-positions": Kind("HHH*", width, expand, layers, positions=False),
    }


def add_model_options(parser: argparse.ArgumentParser):
    """Add the arguments by which needle.py and state_tracking.py choose their models."""
    names = list(_named_kinds(64, 64, 4))
    parser.add_argument("--models", nargs="+", choices=names, default=names)
    parser.add_argument("--width", type=int, help="hidden size")
    parser.add_argument("--expand-ratio", type=int, help="expand ratio of HGRN2")
    parser.add_argument("--layers", type=int, default=4, help="number of layers")


def chosen_kinds(args: argparse.Namespace, width: int, expand: int) -> list[Kind]:
    """Return the models that the command line names. Width and expand ratio are its own, or else the given ones."""
    found = _named_kinds(args.width or width, args.expand_ratio or expand, args.layers)
    return [found[name] for name in args.models]
