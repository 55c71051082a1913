"""Draw sequences of multi-query associative recall (MQAR), on the device that trains on them.

A sequence begins with pairs of a key and a value. Then each key comes once more, with gaps between them, and the model
has to give the key's value there. All other tokens are the filler token 0.

Source: Arora et al., "Zoology", arXiv 2312.04927; its generator (HazyResearch/zoology, multiquery_ar) as the
configuration of its Figure 2 calls it, with random_non_queries off.
"""

import dataclasses

import torch
from batches import Batch
from torch import Tensor

# The exponent of the gaps' power law, which the original calls `power_a`.
POWER = 0.01


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of a sequence in tokens, and its number of pairs of a key and a value.

    Raises:
        ValueError: the sequence is too short for the pairs and a place for each query.
    """

    length: int
    pairs: int

    def __post_init__(self):
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ValueError(
                f"a sequence of {self.length} tokens for {self.pairs} pairs: give an even length of at least "
                f"{4 * self.pairs}, two tokens for a pair and two for its query"
            )


def sequences(size: Size, count: int, vocab: int, generator: torch.Generator) -> Batch:
    """Draw `count` sequences on the generator's device, without waiting for the device.

    Keys are tokens from 1 to vocab / 2 - 1, and values are tokens from vocab / 2 on. All are different within a
    sequence. The places of the queries are drawn one after the other without repetition. Place i, counted from 1, has
    the weight i^(power - 1).

    Raises:
        ValueError: the vocabulary has fewer keys than a sequence has pairs.
    """
    half = vocab // 2
    if half - 1 < size.pairs:
        raise ValueError(f"a vocabulary of {vocab} has {half - 1} keys and a sequence {size.pairs}: give a larger one")
    device, context = generator.device, 2 * size.pairs
    keys = 1 + distinct(count, half - 1, size.pairs, generator)
    values = half + distinct(count, half, size.pairs, generator)
    places = torch.arange(1, (size.length - context) // 2 + 1, device=device)
    # The order of exponential variables is that of places drawn without repetition.
    times = torch.empty(count, len(places), device=device).exponential_(generator=generator) / places ** (POWER - 1)
    queries = context + 2 * times.topk(size.pairs, largest=False).indices
    tokens = torch.zeros(count, size.length, dtype=torch.int64, device=device)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    return Batch(tokens.scatter_(1, queries, keys), queries, values)


def distinct(count: int, choices: int, number: int, generator: torch.Generator) -> Tensor:
    """Draw different numbers below `choices` for each row, [count, number]."""
    return torch.rand(count, choices, generator=generator, device=generator.device).topk(number).indices
