"""HGRN2Config, the settings of the HGRN2 mixer, and UsageError, the error for flags that a user must change."""

import dataclasses
import math
import re
from typing import Any

HGRN2, ATTENTION = "H", "*"
LOWER_BOUNDS = ("learned", "none")
# Symbols of Megatron's --hybrid-layer-pattern: token mixers, each with its letter in an HGRN2Config, channel mixers,
# the separator of pipeline stages, and the one before each head of multi-token prediction. Only a HybridModel has
# multi-latent attention and gated delta nets.
MIXERS = {"M": HGRN2, "*": ATTENTION}
LATENT_ATTENTION, DELTA_NET = "+", "G"
STACK_MIXERS = MIXERS | {symbol: symbol for symbol in (LATENT_ATTENTION, DELTA_NET)}
CHANNEL_MIXERS, EXPERTS, PIPE, HEAD = "-E", "E", "|", "/"


class UsageError(ValueError):
    """Error for a flag or a combination of flags that cannot train HGRN2. The message names the flag to change.

    Args:
        message: what is wrong and what to do instead. If a layer raises the error, Megatron raises it again with the
            name of the layer behind the message. The name is cut off, because it would read as a part of the advice.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"( when instantiating \w+)+$", "", message))


def stages_fit(pattern: str, num_stages: int) -> bool:
    """Return whether the `|` of a HybridModel's pattern fit `num_stages` pipeline stages.

    They fit if there is no `|`, or if every stage gets the same number of segments.
    """
    segments = pattern.count(PIPE) + 1
    return segments == 1 or (num_stages > 1 and segments % num_stages == 0)


def split_heads(pattern: str) -> tuple[str, list[str]]:
    """Return the main part of a HybridModel's pattern, and its heads of multi-token prediction.

    "M-|*-/M-/M-" gives "M-|*-" and ["M-", "M-"].
    """
    main, *heads = pattern.split(HEAD)
    return main, heads


def query_groups(args: Any) -> int:
    """Return the number of heads of keys and values in an attention layer."""
    return args.num_query_groups if args.group_query_attention else args.num_attention_heads


def has_experts(frequency: int | list[int], layer: int) -> bool:
    """Return whether Megatron's `moe_layer_freq` gives experts to a layer of a GPT. `layer` counts from 0."""
    return layer % frequency == 0 if isinstance(frequency, int) else bool(frequency[layer])


@dataclasses.dataclass(frozen=True)
class HGRN2Config:
    """Settings of the HGRN2 part of a model. They do not depend on Megatron.

    Attributes:
        expand_ratio: number K of key and gate channels per head. A layer has hidden_size / expand_ratio heads.
        layer_pattern: string of `H` (HGRN2) and `*` (attention), repeated over the depth of the whole model. In a
            HybridModel it may also have `+` (multi-latent attention) and `G` (gated delta net).
        lower_bounds: "learned" (one row per layer of the model, with a softmax over the layers) or "none" (bound 0).
        norm_eps: epsilon of the mixer's own RMSNorm.

    Raises:
        UsageError: a value is not allowed. The message names its flag.

    Source: arXiv 2404.07904; names follow fla's HGRN2Config where it has one.
    """

    expand_ratio: int = 128
    layer_pattern: str = HGRN2
    lower_bounds: str = "learned"
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.expand_ratio < 1:
            raise UsageError(
                f"--hgrn2-expand-ratio is {self.expand_ratio}, but a head has at least 1 channel: give a divisor of "
                "--hidden-size, for example 128"
            )
        unknown = sorted(set(self.layer_pattern) - set(STACK_MIXERS.values()))
        if unknown or HGRN2 not in self.layer_pattern:
            wrong = f"the unknown letters {' '.join(map(repr, unknown))}" if unknown else "no H"
            raise UsageError(
                f"--hgrn2-layer-pattern {self.layer_pattern!r} has {wrong}: "
                "write H for an HGRN2 layer and * for attention, for example 'HHH*'"
            )
        if self.lower_bounds not in LOWER_BOUNDS:
            raise UsageError(f"--hgrn2-lower-bounds is {self.lower_bounds!r}, but it must be learned or none")
        if not 0 < self.norm_eps < math.inf:
            raise UsageError(f"--hgrn2-norm-eps is {self.norm_eps}, but it must be positive and finite: give 1e-5")

    @classmethod
    def of(cls, settings: Any) -> "HGRN2Config":
        """Read the `hgrn2_*` attributes of Megatron's args or config. One that is missing or None means the default.

        Raises:
            UsageError: a value is not allowed. The message names its flag.
        """
        given = {f.name: getattr(settings, f"hgrn2_{f.name}", None) for f in dataclasses.fields(cls)}
        config = cls(**{name: value for name, value in given.items() if value is not None})
        others = sorted(set(config.layer_pattern) - set(MIXERS.values()))
        if others:
            raise UsageError(
                f"--hgrn2-layer-pattern {config.layer_pattern!r} has layers that only a HybridModel can have, "
                f"{' '.join(others)}: write H and *, or run pretrain_hybrid.py with --hybrid-layer-pattern"
            )
        return config

    @property
    def has_attention(self) -> bool:
        """True if the model has attention layers, plain or multi-latent."""
        return ATTENTION in self.layer_pattern or LATENT_ATTENTION in self.layer_pattern

    @classmethod
    def of_stack(cls, settings: Any, with_heads: bool = False) -> "HGRN2Config":
        """Read the settings of a HybridModel, whose layer pattern comes from Megatron's `hybrid_layer_pattern`.

        Args:
            settings: Megatron's args or config.
            with_heads: whether the layer pattern also has the token mixers of the heads of multi-token prediction,
                which have no rows in the table of lower bounds.

        Returns:
            A config whose `layer_pattern` has one letter for each token mixer: "M-M-|*-/M-" gives "HH*", and "HH*H"
            with the heads.

        Raises:
            UsageError: the pattern is missing, or a HybridModel with HGRN2 layers cannot have it.
        """
        pattern = getattr(settings, "hybrid_layer_pattern", None)
        if not pattern:
            raise UsageError(
                "--spec hgrn2_megatron.spec hgrn2_stack needs --hybrid-layer-pattern: give one to pretrain_hybrid.py, "
                "for example 'M-M-*-', or run pretrain_gpt.py with --spec hgrn2. With --use-checkpoint-args it comes "
                "from the checkpoint: see whether --load names a folder that has one"
            )
        main, heads = split_heads(pattern)
        unknown = sorted(set(pattern) - {*STACK_MIXERS, *CHANNEL_MIXERS, PIPE, HEAD})
        if unknown or "M" not in main:
            symbols = " ".join(map(repr, unknown))
            wrong = f"symbols that an HGRN2 model cannot have, {symbols}" if unknown else "no M"
            where = " before the first /" if heads and not unknown else ""
            raise UsageError(
                f"--hybrid-layer-pattern {pattern!r} has {wrong}{where}: write M for an HGRN2 layer, * for attention, "
                "+ for multi-latent attention, G for a gated delta net, - for an MLP, E for experts, | between "
                "pipeline stages and / before each head of multi-token prediction"
            )
        if "" in heads:
            raise UsageError(
                f"--hybrid-layer-pattern {pattern!r} has a / without a head of multi-token prediction behind it: drop "
                "the /, or write the layers of the head, for example '/*-'"
            )
        given = cls.of(settings)
        if given.layer_pattern != cls.layer_pattern:
            raise UsageError(
                f"--hgrn2-layer-pattern {given.layer_pattern!r} is for a GPT, but this is a HybridModel: drop the flag "
                "and give the layers in --hybrid-layer-pattern, with M for HGRN2 and * for attention"
            )
        symbols = pattern if with_heads else main
        return dataclasses.replace(given, layer_pattern="".join(STACK_MIXERS.get(symbol, "") for symbol in symbols))

    def num_heads(self, hidden_size: int) -> int:
        """Return the number of heads of an HGRN2 layer.

        Raises:
            UsageError: hidden_size is not a multiple of the expand ratio.
        """
        if hidden_size % self.expand_ratio:
            raise UsageError(
                f"--hidden-size {hidden_size} is not a multiple of --hgrn2-expand-ratio {self.expand_ratio}: "
                "change one of them, because an HGRN2 layer has hidden_size / expand_ratio heads"
            )
        return hidden_size // self.expand_ratio

    def is_hgrn2_layer(self, layer: int) -> bool:
        """Return whether a layer is an HGRN2 layer. `layer` counts from 0 over all pipeline stages of the model."""
        return self.layer_pattern[layer % len(self.layer_pattern)] == HGRN2

    def num_hgrn2_layers(self, num_layers: int) -> int:
        """Return the number of HGRN2 layers in a model of `num_layers` layers."""
        return sum(map(self.is_hgrn2_layer, range(num_layers)))

    def check_depth(self, num_layers: int):
        """Refuse a depth at which no layer of a GPT is an HGRN2 layer.

        Raises:
            UsageError: the pattern has an H, but none falls on a layer.
        """
        if not self.num_hgrn2_layers(num_layers):
            raise UsageError(
                f"--hgrn2-layer-pattern is {self.layer_pattern!r}, but no H falls on one of the {num_layers} layers: "
                "give a pattern with an H among its first letters, or more layers"
            )
