"""HGRN2 for NVIDIA Megatron: a gated linear RNN that takes the place of attention."""

from hgrn2_megatron.config import HGRN2Config, UsageError

__all__ = ["HGRN2Config", "UsageError"]
__version__ = "0.1.0"
