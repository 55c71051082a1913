"""Train one small model on one task, with each learning rate and seed side by side, and measure what it learned."""

import dataclasses
import time
from typing import Protocol

import torch
from batches import ON_GPU, Batch, Shape
from kinds import Kind
from torch import Tensor


class Task(Protocol):
    """A task that models learn. It is a dataclass, and its fields are the settings that all models share.

    Attributes:
        steps: length of the training.
        rates: highest learning rates to try.
        seeds: seeds of the initial weights.
        vocab: tokens in the vocabulary.
        shapes: the shapes of the training's batches by name. They take turns from step to step.
    """

    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    @property
    def vocab(self) -> int: ...

    @property
    def shapes(self) -> dict[str, Shape]: ...

    def train_batch(self, step: int) -> Batch:
        """Draw the batch of a training step. It depends only on the step."""

    def measure(self, learner) -> dict:
        """Return what a trained model gets right on held-out sequences, for the JSON."""


def train(kind: Kind, task: Task, graphs: bool) -> dict:
    """Train a model with each learning rate and seed, side by side, and return the results for the JSON."""
    from small_models import Learner, build, start

    start()
    shapes = list(dict.fromkeys(task.shapes.values()))
    learners = {}
    for seed in task.seeds:
        for rate in task.rates:
            model = build(kind, task.vocab, max(shape.length for shape in shapes), seed)
            learners[seed, rate] = Learner(model, rate, task.steps, shapes, graphs)
    begin = time.perf_counter()
    for step in range(task.steps):
        batch = task.train_batch(step)
        for learner in learners.values():
            learner.learn(batch)
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    runs = [
        {"seed": seed, "rate": rate, **task.measure(learner), "curve": curve(learner.history, list(task.shapes))}
        for (seed, rate), learner in learners.items()
    ]
    return {
        **dataclasses.asdict(kind),
        "mixer": kind.mixer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "without_embeddings": sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name),
        "state": kind.state,
        "seconds": round(seconds, 1),
        "seconds_of_measuring": round(time.perf_counter() - begin - seconds, 1),
        "runs": runs,
    }


def compile_kernels(order: list[Kind], task: Task):
    """Run each HGRN2 model forward and backward once for each shape, which compiles its kernels."""
    from small_models import DTYPE, Recaller, build, start

    start()
    for kind in order:
        if kind.pattern != "H":
            # A hybrid has the same kernels, and attention has none of Triton.
            continue
        shapes = task.shapes.values()
        model = Recaller(build(kind, task.vocab, max(shape.length for shape in shapes), 1).to(DTYPE))
        for shape in shapes:
            model.gradients(shape.zeros())


def curve(history: Tensor, names: list[str], points: int = 20) -> dict[str, list]:
    """Return [last step, mean loss, mean accuracy] of each twentieth of the training, by the name of the shape.

    Args:
        history: loss and accuracy of each step, [steps, 2].
        names: the shapes of the batches, which took turns.
        points: the most points of a curve.
    """
    found = {}
    for number, name in enumerate(names):
        rows = history[number :: len(names)].double().cpu()
        pieces = [piece for piece in rows.tensor_split(points) if len(piece)]
        ends = [sum(map(len, pieces[: i + 1])) * len(names) for i in range(len(pieces))]
        means = [piece.mean(0).tolist() for piece in pieces]
        # JSON has no NaN
        found[name] = [
            [end, round(loss, 4) if loss == loss else None, round(right, 4)]
            for end, (loss, right) in zip(ends, means, strict=True)
        ]
    return found
