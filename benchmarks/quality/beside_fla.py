"""Train HGRN2 here and in flash-linear-attention (fla) alike, and say whether their losses differ by more than noise.

    python benchmarks/quality/beside_fla.py --data data --out runs/fla --json fla.json [--gpus 0 1 2] [--lr 1e-3]

The run of fla needs fla 0.6.0 (flash-linear-attention and fla-core), which may be a folder in PYTHONPATH. Three runs
start from the same weights, and read the same batches in the same order in the same loop (fla_twin.py):

    ours       Megatron's model with the layers of this project
    noise      the same with micro-batches of half the size, so that sums are rounded in another order
    fla        fla's HGRN2ForCausalLM

The distance between two runs is the difference of their training losses, for each iteration. fla lies within the noise
if its distance from ours, in the mean and at its largest, is at most twice that between ours and noise.

With one GPU the runs go one after the other, and with several GPUs side by side. A run that is done is not repeated.
With --runs the program trains some of them only. The JSON file is written by the call after which all three are done.
The tokens/s are those of the median iteration, in which fla's tuning of its kernels does not count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import report  # noqa: E402
from draw import pieces_of, read  # noqa: E402
from train import SIZES, check_packages, is_done, merged, run_folder  # noqa: E402

# fla may be this many times as far from ours as the run that differs in rounding only.
TWICE = 2
# The log has seven digits, and the second loss is computed from a mean of two (training_log.py).
DIGITS = 2e-6
RUNS = {"ours": "hgrn2", "noise": "hgrn2", "fla": "hgrn2-fla"}


def folder_of(args: argparse.Namespace, name: str) -> Path:
    return run_folder(args.out / name, RUNS[name], args.lr, args.seed)


def has_run(args: argparse.Namespace, name: str) -> bool:
    """Return whether one of the runs is done."""
    log = merged(folder_of(args, name), SIZES[args.size]["seq"])
    return is_done(log) and log.last == args.iterations


def run(args: argparse.Namespace, name: str, gpu: str):
    """Train one of the runs on a GPU, if it is not done yet.

    Raises:
        ValueError: the run failed.
    """
    if has_run(args, name):
        return
    size, model = SIZES[args.size], RUNS[name]
    words = f"{model} --data {args.data} --out {args.out / name} --size {args.size} --lr {args.lr:g} --seed {args.seed}"
    words += f" --iterations {args.iterations} --evaluations 1 --no-checkpoints --every {args.every}"
    if name == "noise":
        words += f" -- --micro-batch-size {size['micro'] // 2}"
    command = [sys.executable, str(Path(__file__).with_name("train.py")), *words.split()]
    if subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}).returncode:
        raise ValueError(f"the run {name} failed: see the lines above and {folder_of(args, name)}")


def distance(one: dict[int, float], other: dict[int, float]) -> dict[str, float]:
    """Return by how much the losses of a run lie above those of another one, in nats per token.

    Returns:
        "first": the distance in the first iteration, before any update, "mean" and "largest": over all iterations,
        "above": the mean difference with its sign, over the second half.
    """
    above = [other[iteration] - one[iteration] for iteration in sorted(one)]
    half = above[len(above) // 2 :]
    apart = [abs(x) for x in above]
    return {
        "first": apart[0],
        "mean": sum(apart) / len(apart),
        "largest": max(apart),
        "above": sum(half) / len(half),
    }


def verdict(losses: dict[str, dict[int, float]]) -> dict:
    """Compare fla with ours, and ours with the run that differs in rounding only.

    Args:
        losses: iteration -> loss, for each of RUNS.

    Raises:
        ValueError: the runs have different iterations.
    """
    if len({tuple(sorted(one)) for one in losses.values()}) > 1:
        counts = {name: len(one) for name, one in losses.items()}
        raise ValueError(f"the runs have different iterations, {counts}: delete those with too few, and start again")
    fla, noise = (distance(losses["ours"], losses[name]) for name in ("fla", "noise"))
    within = all(fla[what] <= TWICE * max(noise[what], DIGITS) for what in ("mean", "largest"))
    return {"fla from ours": fla, "noise from ours": noise, "within noise": within}


def tenths(losses: dict[str, dict[int, float]]) -> list[dict]:
    """Return a table of mean losses: a line for each tenth of the iterations, and a column for each of RUNS.

    Args:
        losses: iteration -> loss in nats per token, for each of RUNS. All have the same iterations.
    """
    return [
        {"iterations": f"{piece[0]} to {piece[-1]}"}
        | {name: f"{statistics.fmean(one[i] for i in piece):.4f}" for name, one in losses.items()}
        for piece in pieces_of(sorted(losses["ours"]), 10)
    ]


def compare(args: argparse.Namespace) -> dict:
    """Write the JSON file of three runs that are done, and return the verdict."""
    folders = {name: folder_of(args, name) for name in RUNS}
    found = {name: read(folder) for name, folder in folders.items()}
    losses = {name: merged(folder, SIZES[args.size]["seq"]).losses for name, folder in folders.items()}
    about = verdict(losses)
    rows = []
    for name, one in found.items():
        last = [losses[name][iteration] for iteration in sorted(losses[name])[-50:]]
        rows.append(
            {
                "run": name,
                "parameters": one["parameters"],
                "tokens/s": one["tokens_per_second"],
                "mean loss at the end": round(sum(last) / len(last), 5),
                "held-out bits per byte": one["heldout"][-1][2],
                "mean distance": about["fla from ours" if name == "fla" else "noise from ours"]["mean"],
            }
        )
    rows[0]["mean distance"] = 0.0
    curves = {name: [losses[name][iteration] for iteration in sorted(losses[name])] for name in RUNS}
    report.write(args.json, rows, tenths=tenths(losses), verdict=about, flags=found["ours"]["flags"], losses=curves)
    return about


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that tokens.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--json", type=report.json_file, required=True, help="file for losses, speeds and the verdict")
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="the runs to train")
    parser.add_argument("--every", type=int, default=50, help="iterations from one printed line to the next")
    args = parser.parse_args()
    try:
        for name in args.runs:
            if not has_run(args, name):
                check_packages(RUNS[name])
        free = list(args.gpus)
        with ThreadPoolExecutor(len(free)) as pool:

            def start(name: str):
                gpu = free.pop()
                try:
                    run(args, name, gpu)
                finally:
                    free.append(gpu)

            # fla comes first, because its code is the one that may not run on a new machine.
            list(pool.map(start, sorted(args.runs, key=list(RUNS).index, reverse=True)))
        missing = [name for name in RUNS if not has_run(args, name)]
        if missing:
            print(f"{args.json} is not written yet: train {' and '.join(missing)} too")
            return
        found = compare(args)
    except ValueError as error:
        parser.error(str(error))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
