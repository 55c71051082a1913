"""Descriptors, with which TMA finds the tiles of a tensor. They are kept for the next call.

A descriptor depends on the address, the shape and the strides of a tensor, and not on what lies in its memory. So it
serves every tensor that has the same three, and a call that gets the same memory again needs no new descriptor. It
keeps no tensor alive.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hgrn2_kernels.hopper_math import BORDER

# the only head dimension that these kernels support
D = 128
# descriptors that are kept: about 15 for each layer of a model, at 1 KB each; a layer has two groups of them
KEPT = 4096
LAYOUTS = {rank: gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank) for rank in (2, 4, 5)}


class Address:
    """Stands for a tensor in a descriptor. It keeps no memory alive, so descriptors can be kept for later calls."""

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


def descriptor(x: Tensor, C: int, packed: bool) -> TensorDescriptor:
    """Describe tiles [C, D] of one head of x [B, T, H, D] bf16 to TMA, cut off at the end of a sequence.

    TMA reads zeros outside of a tensor and does not write there. In a dense batch, a sequence ends where its row ends.
    For packed sequences, two more dimensions place the end of any sequence at number BORDER of a third dimension:
    the coordinates (BORDER, end, BORDER - end + t) lead to token t, because addresses wrap around at 2^64 bytes.
    triton.tools.ragged_tma does the same.
    """
    return _descriptor(x.data_ptr(), x.shape, x.stride(), C, packed)


@functools.lru_cache(maxsize=KEPT)
def _descriptor(address, shape, strides, C, packed):
    B, T, H, _ = shape
    # torch may set any stride for a dimension of size 1
    b, t, h = (D if size == 1 else stride for size, stride in zip((B, T, H), strides[:3], strict=True))
    base = Address(address, torch.bfloat16)
    if packed:
        many, around = 0x7FFF0000, 2**34
        sizes, steps = [many, many, BORDER.value, H, D], [around - t, t, t, h, 1]
        return TensorDescriptor(base, sizes, steps, [1, 1, C, 1, D], LAYOUTS[5])
    return TensorDescriptor(base, [B, T, H, D], [b, t, h, 1], [1, C, 1, D], LAYOUTS[4])


def state_descriptor(states: Tensor) -> TensorDescriptor:
    """Describe the states [.., D, D] bf16, contiguous, to TMA, one tile per state."""
    return _state_descriptor(states.data_ptr(), states.numel() // D)


@functools.lru_cache(maxsize=KEPT)
def _state_descriptor(address, rows):
    return TensorDescriptor(Address(address, torch.bfloat16), [rows, D], [D, 1], [D, D], LAYOUTS[2])


class Descriptors(tuple):
    """The descriptors of one launch. They keep the driver's form of all of them, see launch.py."""

    def __init__(self, descriptors):
        self.made: dict = {}


def descriptors(inputs: Sequence[Tensor], states: Sequence[Tensor], outputs: Sequence[Tensor], C: int, packed: bool):
    """Return the Descriptors of the tensors of one launch, in this order.

    Args:
        inputs, outputs: tensors for `descriptor`, all of one shape.
        states: tensors for `state_descriptor`, all of one shape.
        C, packed: arguments of `descriptor`.
    """
    tiles = *inputs, *outputs
    return _descriptors(
        *(tuple(map(Tensor.data_ptr, tiles)), tuple(map(Tensor.stride, tiles)), inputs[0].shape, C, packed),
        *(tuple(map(Tensor.data_ptr, states)), states[0].numel() // D, len(inputs)),
    )


@functools.lru_cache(maxsize=KEPT)
def _descriptors(addresses, strides, shape, C, packed, states, rows, n_inputs):
    tiles = [_descriptor(x, shape, y, C, packed) for x, y in zip(addresses, strides, strict=True)]
    return Descriptors([*tiles[:n_inputs], *(_state_descriptor(x, rows) for x in states), *tiles[n_inputs:]])
