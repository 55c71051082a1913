"""Megatron's manager of offloaded activations on a machine without a GPU, where it copies from the CPU to the CPU.

The manager is Megatron's own: groups, order, copies and forced releases. Only its test for GPU tensors is replaced, and
Transformer Engine's switch, which it sets.
"""

import types

import torch


def install() -> None:
    """Let the manager move CPU tensors in this process, which must be in the CPU mode. On a GPU this does nothing."""
    if torch.cuda.is_available():
        return
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler

    transformer_engine.cpu_offload = types.SimpleNamespace(CPUOffloadEnabled=False)
    # megatron-core 0.18 does not look at the device
    if hasattr(ChunkOffloadHandler, "_can_manage_tensor_for_offload"):
        ChunkOffloadHandler._can_manage_tensor_for_offload = staticmethod(
            lambda tensor: not isinstance(tensor, torch.nn.Parameter)
        )


def reset() -> None:
    """Forget the groups of the model that trained before."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    PipelineOffloadManager.reset_instance()
