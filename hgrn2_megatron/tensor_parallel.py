"""Put a parameter where Megatron puts its own, and mark it as split over tensor-parallel ranks."""

import torch
from megatron.core.transformer import TransformerConfig


def parameter_device(config: TransformerConfig) -> torch.device:
    """Return the device on which Megatron's own layers allocate a weight."""
    return torch.device("cpu" if config.use_cpu_initialization else torch.cuda.current_device())


def mark_tensor_parallel(weight: torch.nn.Parameter):
    """Tell Megatron that every TP rank holds its own slice of `weight`, so that no gradient is summed over TP."""
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, 0, 1
