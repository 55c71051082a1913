"""HGRN2 for Megatron: a gated linear RNN in the place of attention."""

from hgrn2_megatron.config import HGRN2Config, UsageError

__all__ = ["HGRN2Config", "UsageError"]
__version__ = "0.1.0"
