"""Muon, an optimizer of Megatron that orthogonalizes the update of each matrix: how it splits a fused projection."""

import torch
from megatron.core.transformer import TransformerConfig

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.settings import Settings, megatron_release


def mark_parts(weight: torch.nn.Parameter, sizes: list[int], config: TransformerConfig):
    """Tell Megatron's Muon that `weight` holds several matrices, which it then orthogonalizes one by one.

    Megatron reads these attributes, and copies them to the fp32 copies of a parameter. It never reads them for other
    optimizers. `--muon-no-split-qkv` turns the split off.

    Megatron 0.18 reads no sizes. It splits every marked weight as it splits the projection of attention. There a weight
    with other sizes gets no mark, and stays one matrix.

    Args:
        weight: [n * sum(sizes), h], the rows of this tensor-parallel rank. The rows consist of n groups, and each group
            has rows of all matrices, one matrix after the other.
        sizes: rows that each matrix has in a group.
        config: Megatron's config of the model.
    """
    if _reads_sizes() or _attention_sizes(config) == sizes:
        weight.is_qkv, weight.qkv_split_shapes = True, sizes


def warning(s: Settings, hgrn2: HGRN2Config) -> str | None:
    """Return a warning if Muon takes q, f and v of this model as one matrix, although it splits other projections."""
    uses_muon = "muon" in (s.optimizer or "") and s.muon_split_qkv is not False
    if not uses_muon or _reads_sizes() or _attention_sizes(s) == [hgrn2.expand_ratio] * 3:
        return None
    return (
        f"--optimizer {s.optimizer} takes q, f and v of an HGRN2 layer as one matrix, because megatron-core 0.18 "
        "splits every projection like that of attention, and the heads of attention have another size: install "
        f"megatron-core 0.19, or give --num-attention-heads {hgrn2.num_heads(s.hidden_size)}"
    )


def _reads_sizes() -> bool:
    """Return whether Megatron reads from a parameter how many rows its matrices have."""
    return megatron_release() >= (0, 19)


def _attention_sizes(s) -> list[int]:
    """Return the rows of queries, keys and values in one group of attention's projection."""
    groups = s.num_query_groups or s.num_attention_heads
    # The first check of a run is before Megatron fills in the size of a head.
    channels = s.kv_channels or s.hidden_size // s.num_attention_heads
    return [s.num_attention_heads // groups * channels, channels, channels]
