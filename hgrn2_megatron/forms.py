"""Relate a HybridModel to the GPT that computes the same function: their layer patterns and the names of their weights.

A layer of a GPT is two layers of a HybridModel, a token mixer and a channel mixer. All other weights exist once in
both forms.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable

from hgrn2_megatron.arguments import is_hgrn2_spec, is_stack_spec
from hgrn2_megatron.config import (
    ATTENTION,
    CHANNEL_MIXERS,
    EXPERTS,
    HEAD,
    HGRN2,
    MIXERS,
    PIPE,
    HGRN2Config,
    UsageError,
    has_experts,
    split_heads,
)

LAYER = re.compile(r"\bdecoder\.layers\.(\d+)\.(\w+)")
CHANNEL_MODULES = ("pre_mlp_layernorm", "mlp")
FINAL_NORM = {"gpt": "decoder.final_layernorm.", "stack": "decoder.final_norm."}
SYMBOLS = {letter: symbol for symbol, letter in MIXERS.items()}


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a model, written in the same way for a GPT and for a HybridModel.

    Attributes:
        stack: whether the model is a HybridModel.
        symbols: one symbol for each layer of a HybridModel, and two for each layer of a GPT. There is no `|`, because
            pipeline stages are not part of the model.
        heads: heads for multi-token prediction as the pattern has them, "/*-/*-". It is empty for a GPT.
        repeated_head: whether several heads are one head with one set of weights.
    """

    stack: bool
    symbols: str
    heads: str = ""
    repeated_head: bool = False

    def same_heads(self, other: "Layers") -> bool:
        """Return whether two models have heads for multi-token prediction with the same weights, or both have none."""
        return (self.heads, self.repeated_head) == (other.heads, other.repeated_head)

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Layers":
        """Read the layers from Megatron's args of any run, with or without HGRN2 layers."""
        spec = getattr(args, "spec", None)
        # Runs of earlier Megatron releases have the older name of the flag.
        names = ("hybrid_layer_pattern", "hybrid_override_pattern")
        pattern = next(filter(None, (getattr(args, name, None) for name in names)), "")
        if is_stack_spec(spec) or (pattern and not is_hgrn2_spec(spec)):
            main, heads = split_heads(pattern)
            repeated = len(heads) > 1 and bool(getattr(args, "mtp_use_repeated_layer", False))
            return cls(True, main.replace(PIPE, ""), "".join(f"{HEAD}{head}" for head in heads), repeated)
        is_hgrn2 = HGRN2Config.of(args).is_hgrn2_layer if is_hgrn2_spec(spec) else lambda layer: False
        experts = _experts(args)
        letters = (HGRN2 if is_hgrn2(layer) else ATTENTION for layer in range(len(experts)))
        return cls(False, stack_pattern("".join(letters), experts))


def _experts(args: argparse.Namespace) -> list[bool]:
    """Return whether each layer of a GPT has experts."""
    layers = range(getattr(args, "num_layers", None) or 0)
    if not getattr(args, "num_experts", None):
        return [False for _ in layers]
    return [has_experts(args.moe_layer_freq, layer) for layer in layers]


def gpt_pattern(pattern: str) -> tuple[str, list[bool]]:
    """Return the layers of the GPT that computes the same function as a HybridModel.

    Args:
        pattern: Megatron's `hybrid_layer_pattern`. Its `|` are ignored, and so are its heads for multi-token
            prediction, because a GPT with HGRN2 layers has none.

    Returns:
        The GPT's layer pattern with one letter for each layer, and for each layer whether it has experts: "M-*E" gives
        "H*" and [False, True].

    Raises:
        UsageError: the layers are not pairs of a token mixer, M or *, and a channel mixer, - or E.
    """
    symbols = split_heads(pattern)[0].replace(PIPE, "")
    pairs = [symbols[i : i + 2] for i in range(0, len(symbols), 2)]
    if not all(len(pair) == 2 and pair[0] in MIXERS and pair[1] in CHANNEL_MIXERS for pair in pairs):
        raise UsageError(
            f"--hybrid-layer-pattern {pattern!r} has no counterpart among GPTs: each layer of a GPT is a pair of a "
            "token mixer, M or *, and a channel mixer, - or E, as in 'M-M-*E'"
        )
    return "".join(MIXERS[pair[0]] for pair in pairs), [pair[1] == EXPERTS for pair in pairs]


def stack_pattern(layers: str, experts: list[bool]) -> str:
    """Return the `hybrid_layer_pattern` of the HybridModel that computes the same function as a GPT.

    Args:
        layers: H or * for each layer of the GPT.
        experts: whether each layer of the GPT has experts.
    """
    return "".join(SYMBOLS[layer] + (EXPERTS if has else "-") for layer, has in zip(layers, experts, strict=True))


def stack_name(name: str) -> str:
    """Return the name in a HybridModel of a weight that has the given name in a GPT.

    Args:
        name: key of a weight in a distributed checkpoint, or of a state that an optimizer keeps for a weight.
    """
    return _renamed(name, "gpt", "stack", lambda layer, module: 2 * layer + (module in CHANNEL_MODULES))


def gpt_name(name: str) -> str:
    """Return the name in a GPT of a weight that has the given name in a HybridModel whose layers are pairs."""
    return _renamed(name, "stack", "gpt", lambda layer, module: layer // 2)


def _renamed(name: str, here: str, there: str, number: Callable[[int, str], int]) -> str:
    name = name.replace(FINAL_NORM[here], FINAL_NORM[there])
    return LAYER.sub(lambda found: f"decoder.layers.{number(int(found[1]), found[2])}.{found[2]}", name)
