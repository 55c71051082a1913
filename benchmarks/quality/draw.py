"""Draw tables and pictures of the runs of train.py, and write their numbers as JSON.

    python benchmarks/quality/draw.py runs/full [--sweep runs/sweep] --json benchmarks/results/quality.json
        [--picture quality.png]

The line of a run has the held-out bits per byte of its last evaluation. The picture shows each model at its best
learning rate. Seconds count training iterations, without evaluations and checkpoints.
"""

import argparse
import json
import math
from pathlib import Path

from train import POSITIONS, bits_per_byte, is_done, merged

# A training curve has at most this many points.
POINTS = 100


def read(folder: Path) -> dict:
    """Return a run's settings and curves for the JSON file.

    Returns:
        The settings of run.json, and:
        "parameters", "tokens", "iterations" and "seconds" at the end of the run,
        "heldout": [[tokens, seconds, bits per byte], ..] on the sample of the held-out documents,
        "training": [[tokens, mean loss in nats per token], ..],
        "lengths": the losses by position of megatron_run.py on all held-out documents, with "bits_per_byte".
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
    size = max(1, -(-len(iterations) // POINTS))
    pieces = [iterations[start : start + size] for start in range(0, len(iterations), size)]
    training = [[piece[-1] * of_one, round(sum(log.losses[i] for i in piece) / len(piece), 5)] for piece in pieces]
    positions = folder / POSITIONS
    lengths = json.loads(positions.read_text()) if positions.exists() else []
    return {
        **{name: run[name] for name in ("model", "size", "lr", "seed", "seq_length", "data", "flags")},
        "parameters": log.parameters,
        "tokens": iterations[-1] * of_one if iterations else 0,
        "iterations": iterations[-1] if iterations else 0,
        "seconds": round(spent, 1),
        "tokens_per_second": round(log.tokens_per_second()) if iterations else None,
        "done": is_done(log),
        "heldout": heldout,
        "training": training,
        "lengths": [one | {"bits_per_byte": round(bits_per_byte(one["loss"], run, "heldout"), 5)} for one in lengths],
    }


def read_all(folder: Path) -> list[dict]:
    """Return the runs in a folder, sorted by model, learning rate and seed.

    Raises:
        ValueError: the folder has no run.
    """
    runs = [read(about.parent) for about in folder.glob("*/run.json")]
    if not runs:
        raise ValueError(f"no run of train.py in {folder}: give the folder that was its --out")
    return sorted(runs, key=lambda run: (run["model"], run["lr"], run["seed"]))


def last(run: dict) -> float:
    """Return the last held-out bits per byte of a run, or infinity if it has none."""
    return run["heldout"][-1][2] if run["heldout"] else float("inf")


def best(runs: list[dict]) -> list[dict]:
    """Return, for each model, the runs of the learning rate with the best held-out loss."""
    chosen: dict[str, dict] = {}
    for run in runs:
        if run["model"] not in chosen or last(run) < last(chosen[run["model"]]):
            chosen[run["model"]] = run
    return [run for run in runs if run["lr"] == chosen[run["model"]]["lr"]]


def table(runs: list[dict]) -> str:
    """Return all runs as lines of Markdown, with each model's best learning rate in bold."""
    bold = {id(run) for run in best(runs)}
    lengths = sorted({one["length"] for run in runs for one in run["lengths"]})
    columns = [
        "model",
        "parameters",
        "learning rate",
        "seed",
        "tokens",
        "seconds",
        "tokens/s",
        "held-out bits per byte",
    ]
    columns += [f"all held-out, {length:,} tokens" for length in lengths]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for run in runs:
        found = f"{last(run):.4f}" if run["heldout"] else "none yet"
        found = f"**{found}**" if id(run) in bold else found
        speed, state = run["tokens_per_second"] or 0, "" if run["done"] else ", not done"
        by_length = {one["length"]: f"{one['bits_per_byte']:.4f}" for one in run["lengths"]}
        cells = [run["model"], f"{run['parameters']:,}", f"{run['lr']:g}", run["seed"], f"{run['tokens']:,}"]
        cells += [f"{run['seconds']:,.0f}", f"{speed:,}", f"{found}{state}"]
        cells += [by_length.get(length, "") for length in lengths]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def picture(runs: list[dict], path: Path):
    """Draw the best runs: held-out bits per byte against tokens and against seconds, and the loss by position."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3 if any(run["lengths"] for run in runs) else 2
    figure, sides = plt.subplots(1, columns, figsize=(5.5 * columns, 4.5), layout="constrained")
    for column, (axes, label) in enumerate(zip(sides[:2], ("million tokens", "seconds of training"), strict=True)):
        for run in best(runs):
            points = [point[column] / (1 if column else 1e6) for point in run["heldout"]]
            values = [point[2] for point in run["heldout"]]
            axes.plot(points, values, ".-", label=f"{run['model']}, {run['lr']:g}, seed {run['seed']}: {last(run):.4f}")
        axes.set(xlabel=label, ylabel="held-out bits per byte")
        axes.grid(alpha=0.3)
    sides[0].legend()
    if columns == 3:
        draw_positions(sides[2], best(runs))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_positions(axes, runs: list[dict]):
    """Draw the held-out loss of each run by position in its longest sequences."""
    for run in runs:
        if run["lengths"]:
            longest = max(run["lengths"], key=lambda one: one["length"])
            values = [loss / math.log(2) for loss in longest["by_position"]]
            step = longest["length"] / len(values)
            axes.plot([(number + 0.5) * step for number in range(len(values))], values, label=run["model"])
    axes.axvline(runs[0]["seq_length"], color="gray", linestyle=":", label="length in training")
    axes.set(xlabel="position", ylabel="held-out bits per token", xscale="log")
    axes.grid(alpha=0.3)
    axes.legend()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that was --out of train.py")
    parser.add_argument("--sweep", type=Path, help="the folder of the sweep, for a second table")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    try:
        runs = read_all(args.runs)
        swept = read_all(args.sweep) if args.sweep else []
    except ValueError as error:
        parser.error(str(error))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"runs": runs, "sweep": swept}, indent=1) + "\n")
    print(table(runs))
    if swept:
        print("\n" + table(swept))
    if args.picture:
        picture(runs, args.picture)


if __name__ == "__main__":
    main()
