"""HGRN2 for NVIDIA Megatron: a gated linear RNN that takes the place of attention."""

from typing import Any

from hgrn2_megatron.config import HGRN2Config, UsageError

__all__ = ["HGRN2Config", "UsageError"]


def __getattr__(name: str) -> Any:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # the one place that states the version is kernels/pyproject.toml
    import importlib.metadata

    return importlib.metadata.version("hgrn2-megatron")
