"""The results of mqar.py, needle.py and state_tracking.py: their JSON file, and the tables that show them."""

import importlib.metadata
import json
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from kinds import Kind


def best(runs: list[dict], score: Callable[[dict], float]) -> list[dict]:
    """Return the runs, one per seed, at the learning rate with the highest mean score."""
    by_rate: dict[float, list[dict]] = {}
    for run in runs:
        by_rate.setdefault(run["rate"], []).append(run)
    return max(by_rate.values(), key=lambda runs: statistics.mean(map(score, runs)))


def cell(accuracies: list[float]) -> str:
    """Return percentages from the lowest to the highest seed, or one number where both are the same."""
    low, high = (f"{100 * accuracy:.1f}" for accuracy in (min(accuracies), max(accuracies)))
    return low if low == high else f"{low} to {high}"


def table(rows: list[dict[str, str]]) -> str:
    """Return rows, each from the name of a column to its text, as lines of Markdown."""
    if not rows:
        return "no model is done"
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Results:
    """The JSON file of a benchmark: the settings, the machine and the models that are done.

    Args:
        out: the file. Its models stay if it has the same settings and comes from the same kind of machine.
        settings: the settings that all models share.
        order: the models of the table, in its order.
        rows: returns the rows of the table from what the file holds.

    Raises:
        SystemExit: the file has other settings or comes from another kind of machine.
    """

    def __init__(self, out: Path, settings: dict, order: list[Kind], rows: Callable[[dict], list[dict[str, str]]]):
        self.out, self.order, self.rows = out, order, rows
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
                self.models[Kind(**{field.name: model[field.name] for field in fields(Kind)})] = model

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
        return {**found, "rows": self.rows(found)}
