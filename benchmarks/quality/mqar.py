"""Multi-query associative recall: how many pairs HGRN2, attention and a hybrid keep, by width and expand ratio.

    python benchmarks/quality/mqar.py --out mqar.json [--widths 128 64] [--steps 6000]
        [--workers 6] [--minutes 9]

The program trains models of two layers on one mix of sequence lengths and numbers of pairs. Each model is trained with
a few learning rates and seeds, and the table shows its accuracy on held-out sequences at the learning rate that did
best. All runs of a model train side by side in one process, and several processes share each GPU. All models see the
same batches in the same order, and no sequence comes twice.

Models are trained in the order of --widths, so name the most important width first. The program writes the JSON file
again whenever a model is done, and it does not repeat models that the file already has with the same settings.
"""

import argparse
import dataclasses

import torch
from batches import HELD_OUT, Batch, Shape, generator
from kinds import EXPANDS, PATTERNS, kinds
from model_processes import add_options, given, run
from mqar_results import rows
from recall import Size, sequences
from tasks import train


@dataclasses.dataclass(frozen=True)
class Recall:
    """The task, with the settings that all models of a table share.

    Attributes:
        sizes: (tokens, pairs) of the sequences. The sizes take turns from step to step.
        vocab: tokens in the vocabulary, of which half are keys and half are values.
        batch: tokens in a step.
        steps: length of the training.
        rates: highest learning rates to try.
        seeds: seeds of the initial weights.
        held_out: sequences of each size that accuracy is measured on. It is at least one batch.
    """

    sizes: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 32), (512, 64))
    vocab: int = 8192
    batch: int = 16384
    steps: int = 6000
    rates: tuple[float, ...] = (1e-3, 3e-3, 6e-3)
    seeds: tuple[int, ...] = (1, 2)
    held_out: int = 1024

    @property
    def shapes(self) -> dict[str, Shape]:
        return {str(pairs): Shape(self.batch // length, length, pairs) for length, pairs in self.sizes}

    def draw(self, number: int, seed: int) -> Batch:
        """Draw a batch of one of the sizes."""
        size = Size(*self.sizes[number])
        return sequences(size, self.batch // size.length, self.vocab, generator(seed))

    def train_batch(self, step: int) -> Batch:
        return self.draw(step % len(self.sizes), step)

    def measure(self, learner) -> dict:
        """Return the accuracy on held-out sequences by the number of pairs."""
        found = {}
        for number, (name, shape) in enumerate(self.shapes.items()):
            count = max(1, self.held_out // shape.batch)
            right = [learner.right(self.draw(number, HELD_OUT + batch)).float().mean() for batch in range(count)]
            found[name] = torch.stack(right).mean().item()
        return {"accuracy": found}


TINY = Recall(((8, 2), (16, 4)), vocab=32, batch=512, steps=160, rates=(1e-2,), seeds=(1,), held_out=256)
WIDTHS = (64, 128, 256, 512)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="in the order of training")
    parser.add_argument(
        "--expand-ratios", type=int, nargs="+", default=EXPANDS, help="a width has those that divide it"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS, help="attention, hybrid, HGRN2")
    add_options(parser)
    args = parser.parse_args()
    task = dataclasses.replace(TINY if args.tiny else Recall(), **given(args))
    try:
        order = kinds(tuple(args.widths), tuple(args.expand_ratios), tuple(args.patterns))
    except ValueError as error:
        parser.error(str(error))
    run(args, task, order, train, rows)


if __name__ == "__main__":
    main()
