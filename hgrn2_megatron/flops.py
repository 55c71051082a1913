"""Floating-point operations of an HGRN2 model, for the TFLOP/s that Megatron logs.

Megatron's own count does not know custom layers.
"""

import argparse
import copy
from collections.abc import Callable

from hgrn2_megatron.arguments import is_stack_spec
from hgrn2_megatron.config import HGRN2Config


def model_flops(args: argparse.Namespace, tokens: int, count: Callable[[argparse.Namespace], float]) -> float:
    """Return the floating-point operations of a forward and backward over `tokens` tokens.

    A multiplication and an addition count as two operations. The count of an HGRN2 layer is the count of the recurrence
    and does not depend on the kernels. It has four projections, the update of the state, and the output read from it.

    Args:
        args: Megatron's validated args.
        tokens: number of tokens in the global batch, without padding.
        count: function that returns Megatron's own count over the same tokens for given args.
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
        # Megatron counts attention in every layer, and its count is linear in kv_channels.
        others.kv_channels = 0
        rest = count(others)
        rest += (count(copy.copy(args)) - rest) * (1 - num_hgrn2 / args.num_layers)
    layer = 4 * args.hidden_size**2 + 2 * args.hidden_size * hgrn2.expand_ratio
    return rest + 6 * tokens * num_hgrn2 * layer
