"""Measure how strong the forget gates of a trained model are, by the bands into which the kernels cut its chunks."""

from unittest.mock import patch

import torch
from torch import Tensor

from hgrn2_kernels import op
from hgrn2_megatron import mixer

# A chunk has CHUNK tokens, and bands are counted for BLOCK channels at a time. A band holds BAND powers of two of
# decay. With more bands than MOST, the exact form takes over.
CHUNK, BLOCK, BAND, MOST = 64, 64, 192, 4


def strength(f: Tensor, lower_bound: Tensor | None) -> dict:
    """Return the strength of the gates of one layer.

    Args:
        f: raw gates [B, T, H, K] of any dtype. The tokens after the last whole chunk do not count.
        lower_bound: [H, K] in fp32, or None.

    Returns:
        "forget": the mean forget gate.
        "bands": shares of (chunk, head, block of channels) that need 1, 2, 3 and 4 bands, and the exact form.
    """
    bound = 0.0 if lower_bound is None else lower_bound
    forget = bound + (1 - bound) * torch.sigmoid(f[:, : f.shape[1] // CHUNK * CHUNK].float())
    # a gate of the kernels is at least 2^-125
    decay = -forget.log2().clamp(min=-125).unflatten(1, (-1, CHUNK)).sum(2)
    strongest = decay.unflatten(-1, (-1, min(BLOCK, f.shape[3]))).amax(-1)
    bands = ((strongest + 1.5) / BAND).int().clamp(max=MOST) + 1
    shares = [round((bands == count).float().mean().item(), 4) for count in range(1, MOST + 2)]
    return {"forget": round(forget.mean().item(), 4), "bands": shares}


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
