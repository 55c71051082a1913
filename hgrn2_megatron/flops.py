"""Floating-point operations of an HGRN2 model, for the TFLOP/s that Megatron logs: it knows no custom layer."""

import argparse
import copy
from collections.abc import Callable

from hgrn2_megatron.arguments import is_stack_spec
from hgrn2_megatron.config import HGRN2Config


def model_flops(args: argparse.Namespace, tokens: int, count: Callable[[argparse.Namespace], float]) -> float:
    """Operations of a forward and backward over `tokens` tokens, a multiplication and an addition being two.

    An HGRN2 layer is counted as what it computes token by token, whatever its kernels do: four projections, the state's
    update and the output read from it.

    Args:
        args: Megatron's, validated.
        tokens: real ones, of the global batch.
        count: Megatron's own count over the same tokens, of other args.
    """
    others = copy.copy(args)
    if is_stack_spec(args.spec):
        hgrn2 = HGRN2Config.of_stack(args)
        num_hgrn2 = args.hybrid_layer_pattern.count("M")
        others.hybrid_layer_pattern = args.hybrid_layer_pattern.replace("M", "")
        rest = count(others)
    else:
        hgrn2 = HGRN2Config.of(args)
        num_hgrn2 = hgrn2.num_hgrn2_layers(args.num_layers)
        # Megatron's count is of attention in every layer, and linear in this
        others.kv_channels = 0
        rest = count(others)
        rest += (count(copy.copy(args)) - rest) * (1 - num_hgrn2 / args.num_layers)
    layer = 4 * args.hidden_size**2 + 2 * args.hidden_size * hgrn2.expand_ratio
    return rest + 6 * tokens * num_hgrn2 * layer
