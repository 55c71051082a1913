"""The table of mqar.py."""

import statistics

from results import best, cell

# A run has learned the task if it recalls at least this share of the fewest pairs. Guessing one of four values is 0.25.
LEARNED = 0.9


def mean_accuracy(run: dict) -> float:
    """Return the mean of a run's accuracy over the sizes."""
    return statistics.mean(run["accuracy"].values())


def learned(run: dict) -> bool:
    """Return whether a run recalls the fewest pairs, so that its other figures show how much the model can hold."""
    return next(iter(run["accuracy"].values())) >= LEARNED


def rows(results: dict) -> list[dict[str, str]]:
    """Return one row of the table per model, in the order of the list: a text for each column.

    The columns of pairs hold the accuracy of all seeds at the learning rate that did best, in percent. "learned" counts
    the runs that learned the task, out of all learning rates and seeds.
    """
    pairs = [str(pairs) for _, pairs in results["settings"]["sizes"]]
    lines = []
    for model in results["models"]:
        runs = best(model["runs"], mean_accuracy)
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
