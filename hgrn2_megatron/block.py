"""Give a stack of layers the lower bounds that its layers share, and print the line that describes the model.

A stack is Megatron's TransformerBlock in a GPT, or HGRN2Stack in a HybridModel.
"""

from collections.abc import Sequence

import torch

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.lower_bounds import DetachedBounds, LowerBounds


def create_bounds(stack, hgrn2: HGRN2Config, num_rows: int) -> LowerBounds | None:
    """Return the stack's replica of the lower bounds, or None if the model has no lower bounds.

    Args:
        stack: module with `config`, `pg_collection` and `pre_process`, which is True on the model's first chunk.
        hgrn2: HGRN2 settings of the model.
        num_rows: number of rows of the table: one for each layer of the whole model that mixes tokens.
    """
    if hgrn2.lower_bounds == "none":
        return None
    config = stack.config
    # With this field on, Megatron sums the gradients of parameters that every pipeline stage has a replica of.
    config.has_cond_embedder = True
    return LowerBounds(
        num_rows,
        hgrn2.num_heads(config.hidden_size),
        hgrn2.expand_ratio,
        config,
        stack.pg_collection.tp,
        stack.pg_collection.pp,
        first=stack.pre_process,
    )


def share_bounds_with_heads(stack, heads) -> None:
    """Connect the HGRN2 layers of the heads of multi-token prediction to the stack's lower bounds.

    A head stands behind the whole stack, so it reads the deepest row. No bound of the stack depends on the heads, and a
    model may drop them. Under `--mtp-detach-heads`, no gradient of a head reaches the table.

    Args:
        stack: module whose `hgrn2_bounds` is the replica of the pipeline stage that has the heads.
        heads: Megatron's MultiTokenPredictionBlock.
    """
    bounds = stack.hgrn2_bounds
    if bounds is None:
        return
    # Megatron 0.18 has no such field
    source = DetachedBounds(bounds) if getattr(stack.config, "mtp_detach_heads", False) else bounds
    for module in heads.modules():
        if hasattr(module, "use_lower_bounds"):
            module.use_lower_bounds(source, bounds.num_layers - 1)


def share_bounds(stack, rows: list[int]) -> None:
    """Connect `stack.hgrn2_bounds` to the stack's HGRN2 layers, or to another output if it has no HGRN2 layer.

    Args:
        stack: module whose `layers` are built.
        rows: row of the table for each layer of the stack. Layers without an HGRN2 mixer ignore theirs.
    """
    if stack.hgrn2_bounds is None:
        return
    mixers = [
        (layer.self_attention, row)
        for layer, row in zip(stack.layers, rows, strict=True)
        if hasattr(layer.self_attention, "use_lower_bounds")
    ]
    for mixer, row in mixers:
        mixer.use_lower_bounds(stack.hgrn2_bounds, row)
    if mixers:
        return
    bounds = stack.hgrn2_bounds
    if not stack.config.overlap_moe_expert_parallel_comm:
        stack.register_forward_hook(lambda stack, inputs, output: bounds.tie(output))
    elif stack.layers:
        # This schedule calls parts of the layers, and neither the stack nor the layers.
        stack.layers[0].self_attention.register_forward_hook(
            lambda attention, inputs, output: (bounds.tie(output[0]), *output[1:])
        )


def banner(config, hgrn2: HGRN2Config, num_layers: int, warnings: list[str], heads: Sequence[str] = ()) -> None:
    """Print the warnings and one line that describes the model, on rank 0. `heads` are those of a HybridModel."""
    from hgrn2_kernels import implementation

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op = implementation(device, config.params_dtype)
    size = getattr(config, "hgrn2_loss_chunk_size", None)
    loss = f", loss by {size} tokens" if size else ""
    mtp = f"{len(heads)} MTP head{'s' if len(heads) > 1 else ''} ({heads[0]}), " if heads else ""
    for warning in warnings:
        print(f"HGRN2 warning: {warning}", flush=True)
    print(
        f"HGRN2: {hgrn2.num_hgrn2_layers(num_layers)} of {num_layers} layers, {mtp}"
        f"expand {hgrn2.expand_ratio}, lower bounds {hgrn2.lower_bounds}, op={op}{loss}",
        flush=True,
    )
