"""Tables and pictures of the runs of train.py, and their numbers as JSON.

    python benchmarks/quality/draw.py runs --json benchmarks/results/quality.json [--picture quality.png]

A run's line has its held-out bits per byte at its last evaluation. Of a model's learning rates the best is drawn.
Seconds are those of training iterations; evaluation and checkpoints are left out.
"""

import argparse
import json
from pathlib import Path

from train import bits_per_byte, merged

# points of a training curve
POINTS = 100


def read(folder: Path) -> dict:
    """A run as JSON has it: what it was, and its curves.

    Returns:
        What run.json says without the flags' paths, and "parameters", "tokens" and "seconds" at the end,
        "heldout": [[tokens, seconds, bits per byte], ..], "training": [[tokens, mean loss in nats per token], ..].
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
    done = bool(iterations) and iterations[-1] == log.last and log.last in log.heldout
    return {
        **{name: run[name] for name in ("model", "size", "lr", "seed", "seq_length", "data", "flags")},
        "parameters": log.parameters,
        "tokens": iterations[-1] * of_one if iterations else 0,
        "seconds": round(spent, 1),
        "tokens_per_second": round(log.tokens_per_second()) if iterations else None,
        "done": done,
        "heldout": heldout,
        "training": training,
    }


def read_all(folder: Path) -> list[dict]:
    """The runs in a folder, by model, learning rate and seed.

    Raises:
        ValueError: there are none.
    """
    runs = [read(about.parent) for about in folder.glob("*/run.json")]
    if not runs:
        raise ValueError(f"no run of train.py in {folder}: give the folder that its --out named")
    return sorted(runs, key=lambda run: (run["model"], run["lr"], run["seed"]))


def last(run: dict) -> float:
    return run["heldout"][-1][2] if run["heldout"] else float("inf")


def best(runs: list[dict]) -> list[dict]:
    """Return, for each model, the runs of the learning rate with the best held-out loss."""
    chosen: dict[str, dict] = {}
    for run in runs:
        if run["model"] not in chosen or last(run) < last(chosen[run["model"]]):
            chosen[run["model"]] = run
    return [run for run in runs if run["lr"] == chosen[run["model"]]["lr"]]


def table(runs: list[dict]) -> str:
    """All runs as lines of Markdown; those of a model's best learning rate in bold."""
    bold = {id(run) for run in best(runs)}
    lines = [
        "| model | parameters | learning rate | seed | tokens | seconds | tokens/s | held-out bits per byte |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        found = f"{last(run):.4f}" if run["heldout"] else "none yet"
        found = f"**{found}**" if id(run) in bold else found
        speed, state = run["tokens_per_second"] or 0, "" if run["done"] else ", not done"
        lines.append(
            f"| {run['model']} | {run['parameters']:,} | {run['lr']:g} | {run['seed']} | {run['tokens']:,} | "
            f"{run['seconds']:,.0f} | {speed:,} | {found}{state} |"
        )
    return "\n".join(lines)


def picture(runs: list[dict], path: Path):
    """Held-out bits per byte of the best runs against tokens and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, sides = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    for column, (axes, label) in enumerate(zip(sides, ("tokens", "seconds of training"), strict=True)):
        for run in best(runs):
            points = [point[column] for point in run["heldout"]]
            values = [point[2] for point in run["heldout"]]
            axes.plot(points, values, ".-", label=f"{run['model']}, {run['lr']:g}, seed {run['seed']}: {last(run):.4f}")
        axes.set(xlabel=label)
        axes.grid(alpha=0.3)
    sides[0].set(ylabel="held-out bits per byte")
    sides[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that train.py's --out named")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args()
    try:
        runs = read_all(args.runs)
    except ValueError as error:
        parser.error(str(error))
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    print(table(runs))
    if args.picture:
        picture(runs, args.picture)


if __name__ == "__main__":
    main()
