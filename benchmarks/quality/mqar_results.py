"""The results of mqar.py: their JSON file, and the table that shows them."""

import importlib.metadata
import json
import statistics
from pathlib import Path

import torch
from kinds import Kind

# A run has learned the task if it recalls at least this share of the fewest pairs. Guessing one of four values is 0.25.
LEARNED = 0.9


def mean_accuracy(run: dict) -> float:
    """Return the mean of a run's accuracy over the sizes."""
    return statistics.mean(run["accuracy"].values())


def learned(run: dict) -> bool:
    """Return whether a run recalls the fewest pairs, so that its other figures show how much the model can hold."""
    return next(iter(run["accuracy"].values())) >= LEARNED


def best(model: dict) -> list[dict]:
    """Return a model's runs at the learning rate with the highest mean accuracy over sizes and seeds."""
    by_rate: dict[float, list[dict]] = {}
    for run in model["runs"]:
        by_rate.setdefault(run["rate"], []).append(run)
    return max(by_rate.values(), key=lambda runs: statistics.mean(map(mean_accuracy, runs)))


def cell(accuracies: list[float]) -> str:
    """Return percentages from the lowest to the highest seed, or one number where both are the same."""
    low, high = (f"{100 * accuracy:.1f}" for accuracy in (min(accuracies), max(accuracies)))
    return low if low == high else f"{low} to {high}"


def rows(results: dict) -> list[dict[str, str]]:
    """Return one row of the table per model, in the order of the list: a text for each column.

    The columns of pairs hold the accuracy of all seeds at the learning rate that did best, in percent. "learned" counts
    the runs that learned the task, out of all learning rates and seeds.
    """
    pairs = [str(pairs) for _, pairs in results["settings"]["sizes"]]
    lines = []
    for model in results["models"]:
        runs = best(model)
        line = {
            "width": str(model["width"]),
            "mixer": model["mixer"],
            "parameters without embeddings": f"{model['without_embeddings']:,}",
            "state": f"{model['state']:,}",
            "learned": f"{sum(map(learned, model['runs']))} of {len(model['runs'])}",
            "learning rate": f"{runs[0]['rate']:g}",
        }
        line |= {f"{number} pairs": cell([run["accuracy"][number] for run in runs]) for number in pairs}
        lines.append(line | {"seconds": f"{model['seconds']:.0f}"})
    return lines


def table(results: dict) -> str:
    """Return the rows as lines of Markdown."""
    found = rows(results)
    if not found:
        return "no model is done"
    lines = [list(found[0]), ["---"] * len(found[0]), *(list(row.values()) for row in found)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Results:
    """The JSON file of the benchmark: the settings, the machine and the models that are done.

    Args:
        out: the file. Its models stay if it has the same settings and comes from the same kind of machine.
        settings: the settings that all models share.
        order: the models of the table, in its order.

    Raises:
        SystemExit: the file has other settings or comes from another kind of machine.
    """

    def __init__(self, out: Path, settings: dict, order: list[Kind]):
        self.out, self.order = out, order
        machine = {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            **{name: importlib.metadata.version(name) for name in ("torch", "triton", "megatron-core")},
        }
        # JSON turns tuples into lists, and the file is compared with this.
        self.head = json.loads(json.dumps({"settings": settings, "machine": machine}))
        self.models: dict[Kind, dict] = {}
        if out.exists():
            before = json.loads(out.read_text())
            if {name: before[name] for name in self.head} != self.head:
                raise SystemExit(
                    f"{out} has other settings or comes from another kind of machine: give another --out, "
                    "or delete the file"
                )
            for model in before["models"]:
                self.models[Kind(model["pattern"], model["width"], model["expand"])] = model

    @property
    def missing(self) -> list[Kind]:
        """The models that are still to be trained, in order."""
        return [kind for kind in self.order if kind not in self.models]

    def add(self, kind: Kind, model: dict):
        """Add a model and write the file again."""
        self.models[kind] = model
        self.out.parent.mkdir(parents=True, exist_ok=True)
        # The file is whole at any moment, so that a program that is killed loses nothing.
        new = self.out.with_suffix(".new")
        new.write_text(json.dumps(self.all(), indent=1) + "\n")
        new.replace(self.out)

    def all(self) -> dict:
        """Return everything that the file holds."""
        rest = [kind for kind in self.models if kind not in self.order]
        found = {**self.head, "models": [self.models[kind] for kind in [*self.order, *rest] if kind in self.models]}
        return {**found, "rows": rows(found)}
