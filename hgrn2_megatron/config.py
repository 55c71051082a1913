"""HGRN2Config: what the mixer itself needs to know, and the errors a user can cause."""

import dataclasses
from typing import Any

HGRN2, ATTENTION = "H", "*"
LOWER_BOUNDS = ("learned", "none")
# symbols of Megatron's --hybrid-layer-pattern: what mixes tokens, by its letter here; what mixes channels; stages
MIXERS = {"M": HGRN2, "*": ATTENTION}
CHANNEL_MIXERS, EXPERTS, PIPE = "-E", "E", "|"


class UsageError(ValueError):
    """A flag or a combination of flags that cannot train HGRN2; the message names the flag to change."""


def stages_fit(pattern: str, num_stages: int) -> bool:
    """Return whether the `|` of a HybridModel's pattern fit so many stages: none, one segment a stage, or several."""
    segments = pattern.count(PIPE) + 1
    return segments == 1 or (num_stages > 1 and segments % num_stages == 0)


@dataclasses.dataclass(frozen=True)
class HGRN2Config:
    """The HGRN2 part of a model, independent of Megatron.

    Attributes:
        expand_ratio: key and gate dimension K of a head; a model has hidden_size / expand_ratio heads.
        layer_pattern: string of `H` (HGRN2) and `*` (attention), repeated over the depth of the whole model.
        lower_bounds: "learned" (one row a block, shared through a softmax over depth) or "none" (bound 0).
        norm_eps: epsilon of the mixer's own RMSNorm.

    Raises:
        UsageError: a value that means nothing, naming its flag.

    Source: arXiv 2404.07904; names follow fla's HGRN2Config where it has one.
    """

    expand_ratio: int = 128
    layer_pattern: str = HGRN2
    lower_bounds: str = "learned"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.expand_ratio < 1:
            raise UsageError(f"--hgrn2-expand-ratio must be at least 1, got {self.expand_ratio}")
        unknown = sorted(set(self.layer_pattern) - {HGRN2, ATTENTION})
        if unknown or HGRN2 not in self.layer_pattern:
            wrong = f"unknown letters {' '.join(unknown)}" if unknown else "no H"
            raise UsageError(
                f"--hgrn2-layer-pattern {self.layer_pattern!r} has {wrong}: "
                "write H for an HGRN2 layer and * for attention, for example 'HHH*'"
            )
        if self.lower_bounds not in LOWER_BOUNDS:
            raise UsageError(f"--hgrn2-lower-bounds must be learned or none, got {self.lower_bounds!r}")
        if not self.norm_eps > 0:
            raise UsageError(f"--hgrn2-norm-eps must be positive, got {self.norm_eps}")

    @classmethod
    def of(cls, settings: Any) -> "HGRN2Config":
        """Read the `hgrn2_*` attributes of Megatron's args or config; defaults where one is absent or None."""
        given = {f.name: getattr(settings, f"hgrn2_{f.name}", None) for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})

    @classmethod
    def of_stack(cls, settings: Any) -> "HGRN2Config":
        """The HGRN2 part of a HybridModel: as `of`, with the layer pattern from Megatron's `hybrid_layer_pattern`.

        Returns:
            A config whose `layer_pattern` has one letter a token mixer of the whole model: "M-M-|*-" gives "HH*".

        Raises:
            UsageError: a pattern that a HybridModel with HGRN2 cannot have.
        """
        pattern = getattr(settings, "hybrid_layer_pattern", None)
        if not pattern:
            raise UsageError(
                "--spec hgrn2_megatron.spec hgrn2_stack needs --hybrid-layer-pattern, for example 'M-M-*-', "
                "and Megatron's pretrain_hybrid.py; for pretrain_gpt.py give --spec hgrn2"
            )
        if "/" in pattern:
            raise UsageError(
                f"--hybrid-layer-pattern {pattern!r}: multi-token prediction is not supported with HGRN2 layers yet; "
                "drop what follows the /"
            )
        unknown = sorted(set(pattern) - {*MIXERS, *CHANNEL_MIXERS, PIPE})
        if unknown or "M" not in pattern:
            wrong = f"symbols that do not go with HGRN2, {' '.join(unknown)}" if unknown else "no M"
            raise UsageError(
                f"--hybrid-layer-pattern {pattern!r} has {wrong}: write M for an HGRN2 layer, * for attention, "
                "- for an MLP, E for experts, | between pipeline stages"
            )
        given = cls.of(settings)
        if given.layer_pattern != cls.layer_pattern:
            raise UsageError(
                f"--hgrn2-layer-pattern {given.layer_pattern!r} is for a GPT: a HybridModel's layers are those of "
                "--hybrid-layer-pattern, M for HGRN2 and * for attention; drop it"
            )
        return dataclasses.replace(given, layer_pattern="".join(MIXERS.get(symbol, "") for symbol in pattern))

    def num_heads(self, hidden_size: int) -> int:
        """Heads of an HGRN2 layer.

        Raises:
            UsageError: hidden_size is no multiple of the expand ratio.
        """
        if hidden_size % self.expand_ratio:
            raise UsageError(
                f"--hidden-size {hidden_size} is not a multiple of --hgrn2-expand-ratio {self.expand_ratio}: "
                "an HGRN2 layer has hidden_size / expand_ratio heads"
            )
        return hidden_size // self.expand_ratio

    def is_hgrn2_layer(self, layer: int) -> bool:
        """Whether block `layer` (0-based over all blocks of the model, whatever stage holds it) is HGRN2."""
        return self.layer_pattern[layer % len(self.layer_pattern)] == HGRN2

    def num_hgrn2_layers(self, num_layers: int) -> int:
        """HGRN2 blocks among the `num_layers` blocks of the model."""
        return sum(map(self.is_hgrn2_layer, range(num_layers)))
