"""Measure how strong the forget gates of a trained model are, by the bands into which the kernels cut its chunks."""

from unittest.mock import patch

import torch
from torch import Tensor

from hgrn2_kernels import op
from hgrn2_kernels.chunk_plan import Config
from hgrn2_kernels.triton_math import BANDS, LIMIT
from hgrn2_megatron import mixer

# powers of two of decay in a band
BAND = 2 * LIMIT.value


def strength(f: Tensor, lower_bound: Tensor | None) -> dict:
    """Return the strength of the gates of one layer.

    Args:
        f: raw gates [B, T, H, K] of any dtype.
        lower_bound: [H, K] in fp32, or None.

    Returns:
        "forget": the mean forget gate.
        "decay": the largest decay of a channel in a chunk, in powers of two.
        "bands": shares of (chunk, head, block of channels) that need 1, 2, 3 and 4 bands, and the exact form, with
            kernels for bf16. The tokens after the last whole chunk do not count here, nor in "decay".
    """
    config = Config.of(torch.bfloat16, f.shape[3], f.shape[3])
    bound = 0.0 if lower_bound is None else lower_bound
    forget = bound + (1 - bound) * torch.sigmoid(f.float())
    # a gate of the kernels is at least 2^-125
    gates = forget.log2().clamp(min=-125)[:, : f.shape[1] // config.C * config.C]
    decay = -gates.unflatten(1, (-1, config.C)).sum(2)
    strongest = decay.unflatten(-1, (-1, min(config.BK, f.shape[3]))).amax(-1)
    bands = ((strongest + 1.5) / BAND).int().clamp(max=BANDS.value) + 1
    shares = [round((bands == count).float().mean().item(), 4) for count in range(1, BANDS.value + 2)]
    return {"forget": round(forget.mean().item(), 4), "decay": round(decay.max().item()), "bands": shares}


class Recorder:
    """A replacement of the mixer's operator that keeps the strength of the gates of each call in `layers`."""

    def __init__(self):
        self.layers: list[dict] = []

    def __call__(self, qfv: Tensor, lower_bound: Tensor | None, **options):
        self.layers.append(strength(qfv.unbind(-2)[1], lower_bound))
        return op.chunk_hgrn2_fused(qfv, lower_bound, **options)


def of_layers(forward) -> list[dict]:
    """Call `forward`, one forward of a model, and return the strength of the gates of its HGRN2 layers in order."""
    recorder = Recorder()
    with torch.no_grad(), patch.object(mixer, "chunk_hgrn2_fused", recorder):
        forward()
    return recorder.layers
