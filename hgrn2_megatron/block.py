"""What a block of layers needs beside its layers: the lower bounds they share, and the line that says what was built.

A block is Megatron's TransformerBlock, or the HybridStack of a HybridModel.
"""

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.lower_bounds import LowerBounds


def create_bounds(block, hgrn2: HGRN2Config, num_blocks: int) -> LowerBounds | None:
    """The block's replica of the lower bounds, or None where bounds are off.

    Args:
        block: with `config`, `pg_collection` and `pre_process`, which Megatron gives the model's first chunk alone.
        hgrn2: the block's HGRN2 settings.
        num_blocks: rows of the table.
    """
    if hgrn2.lower_bounds == "none":
        return None
    config = block.config
    # Megatron sums the gradients of parameters that every pipeline stage has if it is told that there are some
    config.has_cond_embedder = True
    return LowerBounds(
        num_blocks,
        hgrn2.num_heads(config.hidden_size),
        hgrn2.expand_ratio,
        config,
        block.pg_collection.tp,
        block.pg_collection.pp,
        first=block.pre_process,
    )


def share_bounds(block, rows: list[int]) -> None:
    """Give `block.hgrn2_bounds` to the block's HGRN2 layers, or, where it has none, its output.

    Args:
        block: with its `layers` built.
        rows: the table's row of each layer; those of other layers are not read.
    """
    if block.hgrn2_bounds is None:
        return
    mixers = [
        (layer.self_attention, row)
        for layer, row in zip(block.layers, rows, strict=True)
        if hasattr(layer.self_attention, "use_lower_bounds")
    ]
    for mixer, row in mixers:
        mixer.use_lower_bounds(block.hgrn2_bounds, row)
    if not mixers:
        block.register_forward_hook(lambda block, inputs, output: block.hgrn2_bounds.tie(output))


def banner(config, hgrn2: HGRN2Config, num_blocks: int, warnings: list[str]) -> None:
    """One line that proves what was built, and the warnings, on rank 0."""
    import torch

    from hgrn2_kernels import implementation

    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    op = implementation(device, config.params_dtype)
    size = getattr(config, "hgrn2_loss_chunk_size", None)
    loss = f", loss by {size} tokens" if size else ""
    for warning in warnings:
        print(f"HGRN2 warning: {warning}", flush=True)
    print(
        f"HGRN2: {hgrn2.num_hgrn2_layers(num_blocks)} of {num_blocks} layers, "
        f"expand {hgrn2.expand_ratio}, lower bounds {hgrn2.lower_bounds}, op={op}{loss}",
        flush=True,
    )
