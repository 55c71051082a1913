"""GPUs that HGRN2 trains on: their compute capability, and how wide a head may be in the kernels."""

import torch

from hgrn2_kernels.checks import widest_head
from hgrn2_megatron.config import HGRN2Config, UsageError
from hgrn2_megatron.settings import Settings

HEAD = "--hgrn2-expand-ratio"


def check(s: Settings, hgrn2: HGRN2Config, capability: tuple[int, int]):
    """Refuse what the kernels would refuse in the first forward.

    Args:
        s: settings of this run.
        hgrn2: HGRN2 settings of the model.
        capability: compute capability of the GPU.

    Raises:
        UsageError: the GPU is too old, or the heads are too wide for its kernels.
    """
    if problem := too_old(capability):
        raise UsageError(problem)
    dtype = torch.bfloat16 if s.bf16 or s.fp16 else torch.float32
    widest = widest_head(dtype, capability)
    if hgrn2.expand_ratio > widest:
        # 16-bit models may have wider heads on the same GPU
        precision = ", or --bf16" if widest_head(torch.bfloat16, capability) >= hgrn2.expand_ratio else ""
        raise UsageError(
            f"{HEAD} is {hgrn2.expand_ratio}, but on a GPU of compute capability {dotted(capability)} the kernels take "
            f"{str(dtype)[6:]} heads of at most {widest} channels: give {HEAD} {widest} or less{precision}"
        )


def too_old(capability: tuple[int, int]) -> str | None:
    """Return a sentence if GPUs of this compute capability cannot run the kernels, or else None."""
    if widest_head(torch.bfloat16, capability):
        return None
    return (
        f"this GPU has compute capability {dotted(capability)}, and the kernels need 8.0 or higher: use a newer GPU, "
        "or hide this one with CUDA_VISIBLE_DEVICES= to train on the CPU"
    )


def dotted(capability: tuple[int, int]) -> str:
    """Return a compute capability as NVIDIA writes it: "8.0" for (8, 0)."""
    return ".".join(map(str, capability))
