"""Draw tables and pictures of the runs of train.py, and write their numbers as JSON.

    python benchmarks/quality/draw.py runs/full [--sweep runs/sweep] --json benchmarks/results/quality.json
        [--earlier benchmarks/results/first.json ...] [--picture quality.png]

A line of the table has the runs of a model that differ in the seed only: the means of their numbers, and the difference
between the highest and the lowest held-out loss. The held-out bits per byte are those of the last evaluation. The
picture shows each model at its best learning rate, as the mean over its seeds with a band from the lowest to the
highest. The second table has the losses of the same runs by position, and the third those in the beginnings of the
documents that alone fill a sequence. Seconds count training iterations, without evaluations and checkpoints.

--earlier adds the runs of JSON files that this program wrote before. Runs on another build of the corpus get lines of
their own, because their samples of held-out documents differ.
"""

import argparse
import itertools
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from results import table
from train import GATES, MODELS, POSITIONS, bits_per_byte, is_done, merged

# A training curve has at most this many points.
POINTS = 100


def read(folder: Path) -> dict:
    """Return a run's settings and curves for the JSON file.

    Returns:
        The settings of run.json, and:
        "parameters", "tokens", "iterations" and "seconds" at the end of the run,
        "heldout": [[tokens, seconds, bits per byte], ..] on the sample of the held-out documents,
        "training": [[tokens, mean loss in nats per token], ..],
        "lengths": the losses by position of megatron_run.py on all held-out documents, with "bits_per_byte",
        "gates": the strength of the gates of each HGRN2 layer, see gate_strength.py.
    """
    run = json.loads((folder / "run.json").read_text())
    log = merged(folder, run["seq_length"])
    seconds, spent = {}, 0.0
    for iteration in sorted(log.milliseconds):
        spent += log.milliseconds[iteration] / 1000
        seconds[iteration] = spent
    of_one = log.batch * log.seq_length
    heldout = [
        [iteration * of_one, round(seconds[iteration], 2), round(bits_per_byte(loss, run), 5)]
        for iteration, loss in sorted(log.heldout.items())
        if iteration in seconds
    ]
    iterations = sorted(log.losses)
    pieces = pieces_of(iterations, POINTS)
    training = [[piece[-1] * of_one, round(sum(log.losses[i] for i in piece) / len(piece), 5)] for piece in pieces]
    lengths, gates = (json.loads(x.read_text()) if x.exists() else [] for x in (folder / POSITIONS, folder / GATES))
    return {
        **{name: run[name] for name in ("model", "size", "lr", "seed", "seq_length", "data")},
        "flags": f"{run['flags']} {run.get('more flags', '')}".strip(),
        "parameters": log.parameters,
        "tokens": iterations[-1] * of_one if iterations else 0,
        "iterations": iterations[-1] if iterations else 0,
        "seconds": round(spent, 1),
        "tokens_per_second": round(log.tokens_per_second()) if iterations else None,
        "done": is_done(log),
        "heldout": heldout,
        "training": training,
        "lengths": [one | {"bits_per_byte": round(bits_per_byte(one["loss"], run, "heldout"), 5)} for one in lengths],
        "gates": gates,
    }


def pieces_of(iterations: list[int], count: int) -> list[list[int]]:
    """Return at most `count` pieces of a list, which are equally long but for the last one."""
    size = max(1, -(-len(iterations) // count))
    return [iterations[start : start + size] for start in range(0, len(iterations), size)]


def read_all(folder: Path) -> list[dict]:
    """Return the runs in a folder, in their order.

    Raises:
        ValueError: the folder has no run.
    """
    runs = [read(about.parent) for about in folder.glob("*/run.json")]
    if not runs:
        raise ValueError(f"no run of train.py in {folder}: give the folder that was its --out")
    return in_order(runs)


def in_order(runs: list[dict]) -> list[dict]:
    """Return runs sorted by learning rate and seed, with the models in the order of train.py."""
    return sorted(runs, key=lambda run: (list(MODELS).index(run["model"]), run["lr"], run["seed"]))


def last(run: dict) -> float:
    """Return the last held-out bits per byte of a run, or infinity if it has none."""
    return run["heldout"][-1][2] if run["heldout"] else float("inf")


def grouped(runs: list[dict]) -> list[list[dict]]:
    """Return the runs in groups that differ in the seed only."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        # the seed may differ, and so may the folder of the data
        flags = re.sub(r"--(seed|train-data-path|valid-data-path) \S+", "", run["flags"])
        key = *(str(run[name]) for name in ("model", "size", "lr", "tokens", "data")), " ".join(flags.split())
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def best(groups: list[list[dict]]) -> list[list[dict]]:
    """Return, for each model, size and corpus, the group with the best mean of its last held-out losses."""
    chosen: dict[tuple, list[dict]] = {}
    for group in groups:
        key = group[0]["model"], group[0]["size"], str(group[0]["data"])
        if key not in chosen or mean(map(last, group)) < mean(map(last, chosen[key])):
            chosen[key] = group
    return list(chosen.values())


def spread(values: list[float]) -> str:
    """Return the difference between the highest and the lowest value, or nothing if there is only one."""
    return f"{max(values) - min(values):.4f}" if len(values) > 1 else ""


def rows(runs: list[dict]) -> list[dict]:
    """Return the lines of the table: column -> text. The best learning rate of each model is bold."""
    groups = grouped(runs)
    bold = {id(group) for group in best(groups)}
    lengths = sorted({one["length"] for run in runs for one in run["lengths"]})
    found = []
    for group in groups:
        run, values = group[0], [last(one) for one in group if one["heldout"]]
        heldout = f"{mean(values):.4f}" if values else "none yet"
        row = {
            "model": run["model"],
            "mixer": MODELS[run["model"]].title,
            "parameters": f"{run['parameters']:,}",
            "learning rate": f"{run['lr']:g}",
            "seeds": ", ".join(str(one["seed"]) for one in group),
            "tokens": f"{run['tokens']:,}",
            "seconds": f"{mean(one['seconds'] for one in group):,.0f}",
            "tokens/s": f"{mean(one['tokens_per_second'] or 0 for one in group):,.0f}",
            "held-out bits per byte": f"**{heldout}**" if id(group) in bold else heldout,
            "between seeds": spread(values),
        }
        if not all(one["done"] for one in group):
            row["held-out bits per byte"] += ", not done"
        for length in lengths:
            of_length = [x["bits_per_byte"] for one in group for x in one["lengths"] if x["length"] == length]
            row[f"all held-out, {length:,} tokens"] = f"{mean(of_length):.4f}" if of_length else ""
            row[f"between seeds, {length:,} tokens"] = spread(of_length)
        found.append(row)
    return found


def positions(runs: list[dict], long_documents: bool = False) -> list[dict]:
    """Return the table of losses by position: column -> text.

    The losses are those of the best groups in their longest sequences, in nats per token. A line is a range of
    positions, and each range is as long as everything before it.

    Args:
        runs: what `read_all` returns.
        long_documents: whether the sequences are the beginnings of long documents, instead of all documents joined.
    """
    if long_documents:
        runs = [run | {"lengths": of_long_documents(run["lengths"])} for run in runs]
    groups = [group for group in best(grouped(runs)) if any(run["lengths"] for run in group)]
    chosen = dict(zip(names(groups), map(at_length, groups), strict=True))
    if not chosen:
        return []
    length = max(length for length, _ in chosen.values())
    cells = len(next(losses for at, losses in chosen.values() if at == length))
    ends = [0, *(2**power for power in range(cells.bit_length()) if 2**power <= cells)]
    return [
        {"tokens before": f"{start * length // cells:,} to {end * length // cells:,}"}
        | {name: f"{mean(losses[start:end]):.4f}" for name, (at, losses) in chosen.items() if at == length}
        for start, end in itertools.pairwise(ends)
    ]


def of_long_documents(lengths: list[dict]) -> list[dict]:
    """Return the losses by position in the beginnings of long documents, for each length that has such documents."""
    return [one["long_documents"] | {"length": one["length"]} for one in lengths if "long_documents" in one]


def at_length(group: list[dict]) -> tuple[int, list[float]]:
    """Return the length of the longest held-out sequences of a group, and their losses by position, over the seeds."""
    longest = [max(run["lengths"], key=lambda one: one["length"]) for run in group if run["lengths"]]
    return longest[0]["length"], [mean(at) for at in zip(*(one["by_position"] for one in longest), strict=True)]


def picture(runs: list[dict], path: Path):
    """Draw the best groups: the held-out loss against tokens, against seconds, and by position if it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = [group for group in best(grouped(runs)) if all(run["heldout"] for run in group)]
    palette = plt.get_cmap("tab20" if len(groups) > 10 else "tab10")
    colours = {id(group): palette(number % 20) for number, group in enumerate(groups)}
    columns = 3 if any(run["lengths"] for run in runs) else 2
    figure, sides = plt.subplots(1, columns, figsize=(4 * columns, 3.4 + 0.1 * len(groups)), layout="constrained")
    for column, (axes, label) in enumerate(zip(sides[:2], ("million tokens", "seconds of training"), strict=True)):
        for group in groups:
            points = list(zip(*(run["heldout"] for run in group), strict=False))
            x = [mean(point[column] for point in at) / (1 if column else 1e6) for at in points]
            values = [[point[2] for point in at] for at in points]
            colour = colours[id(group)]
            axes.plot(x, list(map(mean, values)), ".-", color=colour)
            axes.fill_between(x, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2)
        # The first losses are so high that the last ones would lie on each other.
        top = max((run["heldout"][len(run["heldout"]) // 3][2] for group in groups for run in group), default=1)
        low = min((last(run) for group in groups for run in group), default=0)
        axes.set(xlabel=label, ylabel="held-out bits per byte", ylim=(low - 0.05 * (top - low), top))
        axes.grid(alpha=0.3)
    if columns == 3:
        draw_positions(sides[2], groups, colours)
    titles = names(groups)
    # an inch holds about 14 letters
    fit = max(1, 14 * 4 * columns // (max(map(len, titles), default=0) + 6))
    figure.legend(sides[0].get_lines(), titles, loc="outside lower center", ncols=fit)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def names(groups: list[list[dict]]) -> list[str]:
    """Return the titles of the models, with the learning rate where rates differ and the number of seeds above one."""
    rates = {group[0]["lr"] for group in groups}
    return [
        MODELS[group[0]["model"]].title
        + (f", {group[0]['lr']:g}" if len(rates) > 1 else "")
        + (f", {len(group)} seeds" if len(group) > 1 else "")
        for group in groups
    ]


def draw_positions(axes, groups: list[list[dict]], colours: dict[int, tuple]):
    """Draw the held-out loss by position in the longest sequences, as the mean over the seeds of each group."""
    for group in groups:
        if any(run["lengths"] for run in group):
            length, losses = at_length(group)
            places = [(number + 0.5) * length / len(losses) for number in range(len(losses))]
            axes.plot(places, [loss / math.log(2) for loss in losses], color=colours[id(group)])
    axes.axvline(groups[0][0]["seq_length"], color="gray", linestyle=":", label="length in training")
    axes.set(xlabel="position", ylabel="held-out bits per token", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that was --out of train.py")
    parser.add_argument("--sweep", type=Path, help="the folder of the sweep, for a second table")
    parser.add_argument("--earlier", type=Path, nargs="+", default=[], help="JSON files with more runs")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    try:
        earlier = [run for path in args.earlier for run in json.loads(path.read_text())["runs"]]
        runs = in_order([*earlier, *read_all(args.runs)])
        swept = read_all(args.sweep) if args.sweep else []
    except ValueError as error:
        parser.error(str(error))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found = {"rows": rows(runs), "positions": positions(runs), "long documents": positions(runs, long_documents=True)}
    found |= {"sweep rows": rows(swept), "runs": runs, "sweep": swept}
    args.json.write_text(json.dumps(found, indent=1) + "\n")
    for lines in (found["rows"], found["positions"], found["long documents"], found["sweep rows"]):
        if lines:
            print(table(lines) + "\n")
    if args.picture:
        picture(runs, args.picture)


if __name__ == "__main__":
    main()
