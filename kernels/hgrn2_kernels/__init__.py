"""The HGRN2 sequence operator, `chunk_hgrn2`, and the recurrence that defines it. Free of Megatron."""

from hgrn2_kernels.op import chunk_hgrn2
from hgrn2_kernels.reference import recurrent_hgrn2

__all__ = ["chunk_hgrn2", "recurrent_hgrn2"]
