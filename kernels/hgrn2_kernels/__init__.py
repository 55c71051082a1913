"""The HGRN2 sequence operator, `chunk_hgrn2`, and the recurrence that defines it. Free of Megatron."""

from hgrn2_kernels.op import chunk_hgrn2, chunk_hgrn2_fused, chunk_hgrn2_pytorch, implementation
from hgrn2_kernels.reference import recurrent_hgrn2
from hgrn2_kernels.segments import combine_states, segment_states
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
    "segment_states",
    "step_hgrn2",
]
