"""Batches of the small models: sequences, and the positions at which the models have to give answers.

This module needs torch only, so that a program can draw batches without Megatron.
"""

from typing import NamedTuple

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# Held-out batches are numbered from here, which is beyond every training step.
HELD_OUT = 1 << 40


class Batch(NamedTuple):
    """Sequences of one length, and the positions at which the model has to give answers.

    Attributes:
        tokens: [batch, length] int64.
        queries: [batch, questions] int64, positions in the sequence.
        answers: [batch, questions] int64, the token that the model has to give at each query.
    """

    tokens: Tensor
    queries: Tensor
    answers: Tensor


class Shape(NamedTuple):
    """The sizes of a batch: sequences, tokens in a sequence, and questions about it."""

    batch: int
    length: int
    questions: int

    def zeros(self) -> Batch:
        """Return a batch of zeros of this shape on the device that trains."""
        shapes = (self.batch, self.length), (self.batch, self.questions), (self.batch, self.questions)
        return Batch(*(torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in shapes))


def generator(seed: int) -> torch.Generator:
    """Return a generator on the device that trains."""
    return torch.Generator("cuda" if ON_GPU else "cpu").manual_seed(seed)
