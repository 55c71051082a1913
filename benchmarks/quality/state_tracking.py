"""State tracking: can HGRN2, attention and a hybrid follow a small machine, also for longer than in the training?

    python benchmarks/quality/state_tracking.py --out state_tracking.json [--machines parity] [--models hgrn2 hybrid]

Each token changes the state of a machine, and after each token the model has to name the state. There are three
machines:

- parity: the state is the number of ones so far, modulo 2.
- s3: the state is the product of the permutations of three things so far.
- latch: the state is the last bit that was written. Most tokens write nothing.

Layers whose gates lie in (0, 1), such as those of HGRN2, are expected to fail at parity and s3 (arXiv 2411.12537). They
can follow the latch, which shows that the training works. The program trains on sequences of 64
tokens and then asks in sequences of 1,024. All models see the same batches in the same order. The program writes the
JSON file again whenever a model is done, and it does not repeat models that the file already has with the same
settings.
"""

import argparse
import dataclasses
import itertools
import statistics

import torch
from batches import HELD_OUT, Batch, Shape, generator
from kinds import Kind, add_model_options, chosen_kinds
from model_processes import add_options, given, run
from results import best, cell
from tasks import train
from torch import Tensor

PERMUTATIONS = list(itertools.permutations(range(3)))
# The state after a token, by state and token. Each machine begins in state 0.
MACHINES = {
    "parity": [[0, 1], [1, 0]],
    "s3": [[PERMUTATIONS.index(tuple(a[i] for i in b)) for b in PERMUTATIONS] for a in PERMUTATIONS],
    "latch": [[0, 1, *[0] * 6], [0, 1, *[1] * 6]],
}


def states(machine: str, tokens: Tensor) -> Tensor:
    """Return the state of a machine after each token, [batch, length], without a step per token."""
    # The function from the state before to the state after, [batch, length, states].
    steps = torch.tensor(MACHINES[machine], device=tokens.device).t()[tokens]
    distance = 1
    while distance < tokens.shape[1]:
        # Each function takes in that of the tokens before.
        later = steps[:, distance:].gather(2, steps[:, :-distance])
        steps = torch.cat([steps[:, :distance], later], dim=1)
        distance *= 2
    return steps[:, :, 0]


def sequences(machine: str, count: int, length: int, generator: torch.Generator) -> Batch:
    """Draw sequences on the generator's device.

    A machine's own tokens are the numbers from 0 on, and the tokens after them are the names of its states.
    """
    inputs = len(MACHINES[machine][0])
    tokens = torch.randint(inputs, (count, length), generator=generator, device=generator.device)
    queries = torch.arange(length, device=generator.device).expand(count, -1).contiguous()
    return Batch(tokens, queries, inputs + states(machine, tokens))


@dataclasses.dataclass(frozen=True)
class Tracking:
    """The task, with the settings that all models of a table share.

    Attributes:
        machines: the machines to follow. A model is trained anew for each.
        length: tokens of a training sequence.
        batch: sequences in a step.
        steps: length of the training.
        rates: highest learning rates to try.
        seeds: seeds of the initial weights.
        lengths: accuracy is measured from each of these positions to the next, and from 0 to the first.
        held_out: held-out sequences. They are as long as the last of `lengths`.
    """

    machines: tuple[str, ...] = tuple(MACHINES)
    length: int = 64
    batch: int = 128
    steps: int = 4000
    rates: tuple[float, ...] = (1e-3, 3e-3)
    seeds: tuple[int, ...] = (1, 2)
    lengths: tuple[int, ...] = (16, 64, 128, 256, 512, 1024)
    held_out: int = 256

    vocab = 16

    @property
    def shapes(self) -> dict[str, Shape]:
        return {str(self.length): Shape(self.batch, self.length, self.length)}

    def train_batch(self, step: int) -> Batch:
        return sequences(self.machines[0], self.batch, self.length, generator(step))

    def measure(self, learner) -> dict:
        """Return the machine and the share of states that are right, by the last position of each stretch."""
        batch = sequences(self.machines[0], self.held_out, self.lengths[-1], generator(HELD_OUT))
        right = learner.right(batch).float().mean(0)
        stretches = zip((0, *self.lengths), self.lengths, strict=False)
        accuracy = {str(end): right[begin:end].mean().item() for begin, end in stretches}
        return {"machine": self.machines[0], "accuracy": accuracy}


def train_each(kind: Kind, task: Tracking, graphs: bool) -> dict:
    """Train a model on each machine, one after the other, and return the results for the JSON."""
    found = [train(kind, dataclasses.replace(task, machines=(machine,)), graphs) for machine in task.machines]
    sums = {name: round(sum(one[name] for one in found), 1) for name in ("seconds", "seconds_of_measuring")}
    return {**found[0], **sums, "runs": [run for one in found for run in one["runs"]]}


def score(run: dict) -> float:
    """Return the mean accuracy over all stretches, because a model that is right everywhere is the best."""
    return statistics.mean(run["accuracy"].values())


def rows(results: dict) -> list[dict[str, str]]:
    """Return one row per machine and model: the share of right states of all seeds, in percent, by position."""
    lines = []
    for machine in results["settings"]["machines"]:
        for model in results["models"]:
            runs = best([run for run in model["runs"] if run["machine"] == machine], score)
            line = {
                "machine": machine,
                "a guess": f"{100 / len(MACHINES[machine]):.1f}",
                "mixer": model["mixer"],
                "parameters": f"{model['parameters']:,}",
                "learning rate": f"{runs[0]['rate']:g}",
            }
            begin = 1
            for end in runs[0]["accuracy"]:
                line[f"tokens {begin} to {end}"] = cell([run["accuracy"][end] for run in runs])
                begin = int(end) + 1
            lines.append(line)
    return lines


TINY = dict(
    machines=("latch",), length=16, batch=32, steps=60, rates=(1e-2,), seeds=(1,), lengths=(16, 32), held_out=64
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, help="the machines to follow")
    add_model_options(parser)
    parser.add_argument("--length", type=int, help="tokens of a training sequence")
    parser.add_argument("--lengths", type=int, nargs="+", help="positions between which accuracy is measured")
    parser.add_argument("--batch", type=int, help="sequences in a step")
    add_options(parser)
    args = parser.parse_args()
    chosen = given(args, "machines", "length", "lengths", "batch")
    task = Tracking(**(TINY if args.tiny else {}) | chosen)
    order = chosen_kinds(args, *((32, 32) if args.tiny else (128, 64)))
    run(args, task, order, train_each, rows)


if __name__ == "__main__":
    main()
