"""Needles in bytes: what HGRN2, attention and a hybrid find in a long text after a training with short ones.

    python benchmarks/quality/needle.py --out needle.json [--text FILE] [--models hgrn2 hybrid]

A sequence is filler text that hides a few lines with a key and a value, the needles. Later the key of each needle comes
once more, and the model has to give the value. The program trains small models on sequences of 2,048 bytes. Then it
asks them at the end of sequences of up to 32,768 bytes, with the needle at a given depth. An answer counts if all bytes
of the value are right. The table shows the learning rate that did best at the length of the training. Rotary positions
beyond that length are new to attention, so the program also trains a hybrid without positions.

All models see the same batches in the same order. The held-out sequences have filler from other files. The program
writes the JSON file again whenever a model is done, and it does not repeat models that the file already has with the
same settings.
"""

import argparse
import dataclasses
import functools
import statistics
import sysconfig
from pathlib import Path

import needles
import torch
from batches import HELD_OUT, ON_GPU, Batch, Shape, generator
from kinds import add_model_options, chosen_kinds
from model_processes import add_options, given, run
from needles import Layout
from results import best, cell
from tasks import train
from torch import Tensor

# A run has learned the task if it finds at least this share of the needles at the length of the training.
LEARNED = 0.9


@dataclasses.dataclass(frozen=True)
class Needles:
    """The task, with the settings that all models of a table share.

    Attributes:
        text: a file or a folder of filler text.
        text_bytes: most bytes of it that are read.
        length: bytes of a training sequence.
        needles: needles in a sequence. The last question is at its end.
        key: bytes of a key.
        value: bytes of a value.
        batch: sequences in a step.
        steps: length of the training.
        rates: highest learning rates to try.
        seeds: seeds of the initial weights.
        lengths: bytes of the held-out sequences.
        depths: places of the needle in the filler, from 0 (begin) to 1 (end).
        held_out: sequences of each length and depth that accuracy is measured on.
        at_once: bytes of the held-out sequences that are computed at a time.
    """

    text: str
    text_bytes: int = 1 << 25
    length: int = 2048
    needles: int = 16
    key: int = 2
    value: int = 4
    batch: int = 16
    steps: int = 3000
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    seeds: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (2048, 4096, 8192, 16384, 32768)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    held_out: int = 128
    at_once: int = 1 << 16

    vocab = 256

    @property
    def shapes(self) -> dict[str, Shape]:
        return {str(self.length): Shape(self.batch, self.length, self.needles * self.value)}

    @functools.cached_property
    def texts(self) -> tuple[Tensor, Tensor]:
        """The filler text of the training and that of the held-out sequences, on the device that trains."""
        train, held_out = needles.read(Path(self.text), self.text_bytes)
        return (train.cuda(), held_out.cuda()) if ON_GPU else (train, held_out)

    def layout(self, length: int) -> Layout:
        return Layout(length, self.needles, self.key, self.value)

    def train_batch(self, step: int) -> Batch:
        return needles.sequences(self.layout(self.length), self.batch, self.texts[0], generator(step))

    def measure(self, learner) -> dict:
        """Return the shares of values and of bytes that are right, by length and depth."""
        exact: dict[str, dict[str, float]] = {}
        of_bytes: dict[str, dict[str, float]] = {}
        for length in self.lengths:
            count = max(1, min(self.held_out, self.at_once // length))
            seeds = range(HELD_OUT, HELD_OUT + -(-self.held_out // count))
            for depth in self.depths:
                right = torch.cat([self._right(learner, length, count, depth, seed) for seed in seeds])
                exact.setdefault(str(length), {})[str(depth)] = right.all(dim=1).float().mean().item()
                of_bytes.setdefault(str(length), {})[str(depth)] = right.float().mean().item()
        return {"accuracy": exact, "accuracy_of_bytes": of_bytes}

    def _right(self, learner, length: int, count: int, depth: float, seed: int) -> Tensor:
        """Return which bytes of the last question's value are right, [count, value]."""
        batch = needles.sequences(self.layout(length), count, self.texts[1], generator(seed), depth)
        return learner.right(batch)[:, -self.value :]


def score(run: dict) -> float:
    """Return the accuracy at the shortest length, which is that of the training."""
    return statistics.mean(next(iter(run["accuracy"].values())).values())


def rows(results: dict) -> list[dict[str, str]]:
    """Return one row per model and length: the share of values that all seeds gave, in percent, by depth.

    The learning rate is that with the best results at the shortest length. "learned" counts the runs that learned the
    task, out of all learning rates and seeds.
    """
    lines = []
    for model in results["models"]:
        runs = best(model["runs"], score)
        for length in runs[0]["accuracy"]:
            found = [run["accuracy"][length] for run in runs]
            line = {
                "mixer": model["mixer"],
                "parameters": f"{model['parameters']:,}",
                "learned": f"{sum(score(run) >= LEARNED for run in model['runs'])} of {len(model['runs'])}",
                "learning rate": f"{runs[0]['rate']:g}",
                "bytes": f"{int(length):,}",
            }
            line |= {f"depth {float(depth):.0%}": cell([one[depth] for one in found]) for depth in found[0]}
            lines.append(line | {"mean": cell([statistics.mean(one.values()) for one in found])})
    return lines


def check(task: Needles):
    """Check the sizes and the text before anything is trained.

    Raises:
        ValueError: a length has no room for the needles, or the text is shorter than the longest sequence.
        OSError: the text cannot be read.
    """
    for length in (task.length, *task.lengths):
        task.layout(length)
    shortest, longest = min(map(len, needles.read(Path(task.text), task.text_bytes))), max(task.length, *task.lengths)
    if shortest < longest:
        raise ValueError(
            f"--text {task.text} gives {shortest} bytes of filler, for the training or for held-out sequences, but "
            f"--lengths has {longest}: give a longer text or shorter lengths"
        )


TINY = dict(
    text_bytes=1 << 20, length=64, needles=4, key=1, value=1, batch=32, steps=40, rates=(1e-2,), lengths=(64, 128),
    depths=(0.0, 1.0), held_out=64, at_once=4096,
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=sysconfig.get_path("stdlib"), help="a file, or a folder of Python files")
    add_model_options(parser)
    parser.add_argument("--length", type=int, help="bytes of a training sequence")
    parser.add_argument("--lengths", type=int, nargs="+", help="bytes of held-out sequences")
    parser.add_argument("--needles", type=int, help="needles in a sequence")
    parser.add_argument("--key", type=int, help="bytes of a key")
    parser.add_argument("--value", type=int, help="bytes of a value")
    parser.add_argument("--batch", type=int, help="sequences in a step")
    add_options(parser)
    args = parser.parse_args()
    chosen = given(args, "length", "lengths", "needles", "key", "value", "batch")
    try:
        task = Needles(args.text, **(TINY if args.tiny else {}) | chosen)
        check(task)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    order = chosen_kinds(args, *((32, 32) if args.tiny else (256, 128)))
    run(args, task, order, train, rows)


if __name__ == "__main__":
    main()
