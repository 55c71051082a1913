"""Megatron's manager of offloaded activations on a machine without a GPU, where it copies from the CPU to the CPU.

The manager is Megatron's own: groups, order, copies and forced releases. Its test for GPU tensors is replaced, and
Transformer Engine's switch, which it sets. A copy to the host is there only after a wait for its event, as on a GPU
whose streams run late.
"""

import types

import torch


def install() -> None:
    """Let the manager move CPU tensors in this process, which must be in the CPU mode. On a GPU this does nothing."""
    if torch.cuda.is_available():
        return
    from megatron.core.extensions import transformer_engine
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler, OffloadTensorGroup

    _copy_late(ChunkOffloadHandler, OffloadTensorGroup)
    transformer_engine.cpu_offload = types.SimpleNamespace(CPUOffloadEnabled=False)
    # megatron-core 0.18 does not look at the device
    if hasattr(ChunkOffloadHandler, "_can_manage_tensor_for_offload"):
        ChunkOffloadHandler._can_manage_tensor_for_offload = staticmethod(
            lambda tensor: not isinstance(tensor, torch.nn.Parameter)
        )


def _copy_late(handler: type, group: type) -> None:
    offload, record, wait = handler.offload, group.record_offload_event, group.wait_offload_event
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def late_offload(self, *args, **kwargs):
        state = offload(self, *args, **kwargs)
        copies.append((state[1], state[1].clone()))
        state[1].fill_(torch.nan)
        return state

    def record_copies(self, stream):
        self.late, copies[:] = list(copies), []
        record(self, stream)

    def wait_for_copies(self, stream):
        wait(self, stream)
        for on_host, data in self.late:
            on_host.copy_(data)
        self.late = []

    handler.offload, group.record_offload_event, group.wait_offload_event = late_offload, record_copies, wait_for_copies


def reset() -> None:
    """Forget the groups of the model that trained before."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    PipelineOffloadManager.reset_instance()
