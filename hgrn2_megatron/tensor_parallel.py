"""Helpers for a parameter that is sharded over tensor-parallel ranks: its device, and its marks for Megatron."""

import torch
from megatron.core.transformer import TransformerConfig


def parameter_device(config: TransformerConfig) -> torch.device:
    """Return the device on which Megatron's own layers allocate their weights."""
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def mark_tensor_parallel(weight: torch.nn.Parameter):
    """Mark `weight` as sharded on axis 0, so that Megatron does not sum its gradient over the TP ranks."""
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
