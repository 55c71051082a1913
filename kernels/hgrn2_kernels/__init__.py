"""The HGRN2 sequence operator `chunk_hgrn2`, its decoding step, and the recurrence that defines both.

The package does not import Megatron. On a CPU it does not import Triton.

    chunk_hgrn2, chunk_hgrn2_fused: the operator for training and prefill, on a GPU or a CPU.
    chunk_hgrn2_pytorch: the same in plain PyTorch on any device.
    step_hgrn2: a few new tokens per sequence, for decoding.
    recurrent_hgrn2: the recurrence, token by token; the reference that the others are tested against.
    chunk_hgrn2_sharded, Pieces, Ends: the operator over sequences that are sharded over several processes.
    shard_states, combine_states: the effect of a shard of a sequence on a state, and the states between shards.
    implementation: "triton" or "pytorch", for a device and a dtype.
"""

from hgrn2_kernels.op import chunk_hgrn2, chunk_hgrn2_fused, chunk_hgrn2_pytorch, implementation
from hgrn2_kernels.reference import recurrent_hgrn2
from hgrn2_kernels.shard_states import combine_states, shard_states
from hgrn2_kernels.sharded import Ends, Pieces, chunk_hgrn2_sharded
from hgrn2_kernels.step import step_hgrn2

__all__ = [
    "Ends",
    "Pieces",
    "chunk_hgrn2",
    "chunk_hgrn2_fused",
    "chunk_hgrn2_pytorch",
    "chunk_hgrn2_sharded",
    "combine_states",
    "implementation",
    "recurrent_hgrn2",
    "shard_states",
    "step_hgrn2",
]
