"""Sweep the learning rate of each model, then train each model with its best rate, on all GPUs and in a given time.

    python benchmarks/quality/side_by_side.py --data data --out runs --gpus 0 1 --seconds 1200 [--seeds 1 2]
        [--models hgrn2 hgrn2-no-bounds hgrn2-expand-16 --rates 1e-3]

Every run is a process of train.py. Two runs share a GPU: one trains while the next starts up and waits for its turn.
The program reports a run that fails and goes on with the others. Call it again, and it leaves out what is done.

1. The sweep trains each model with each learning rate for --sweep-iterations, without checkpoints. Its folder is
   runs/sweep.
2. The choice takes for each model the rate with the lowest held-out loss. All runs get the same number of iterations,
   as many as the rest of the time allows at the speeds that the sweep measured. If that is less than --least-tokens,
   the last models are left out until there is a GPU for each run. The choice is in runs/choice.json.
3. The full runs train each model with each seed, in runs/full. Each GPU gets its runs before they start, the longest
   runs first, each on the GPU that has the least to do.

With one rate for each model, the sweep only measures speeds. Runs that are done are left out, so a second call with
another seed or more models adds to the folders of the first one. It needs --iterations with the number of the first.

README.md beside this file says how long each part takes.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from draw import last, read, read_all
from train import MODELS, SIZES, check_packages, mixer_flags, run_folder

HERE = Path(__file__).resolve().parent
# Seconds of a full run that are no iterations: its start, evaluations, the checkpoint, and the losses by position.
AROUND = 60
# The full runs get this share of the time that is left, because an iteration can take longer than in the sweep.
SHARE = 0.95
# A GPU's first run starts this many seconds before its second, so that it takes its turn first.
LEAD = 10
# The sweep has one seed, whatever seeds the full runs have, so that later calls find its runs.
SWEEP_SEED = 1
START = time.monotonic()


def say(text: str):
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - START:6.0f} s  {text}", flush=True)


@dataclasses.dataclass
class Job:
    """One call of train.py.

    Attributes:
        name: names its console output.
        words: its command line.
    """

    name: str
    words: list[str]

    def run(self, gpu: str, out: Path):
        """Run the job on a GPU, and report how it ended."""
        console = out / f"{self.name}.console"
        say(f"{self.name}: starts on GPU {gpu}")
        command = [sys.executable, str(HERE / "train.py"), *self.words, "--turn", str(out / f"turn.{gpu}")]
        with open(console, "w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            )
        failed = done.returncode != 0
        tail = console.read_text(errors="replace").splitlines()[-15 if failed else -2 :]
        say(f"{self.name}: {'FAILED' if failed else 'ends'}: " + (" | ".join(tail) if not failed else ""))
        if failed:
            print("\n".join(tail), flush=True)


def work(lists: dict[str, list[Job]], out: Path):
    """Run each GPU's jobs in their order, two at a time, and return when all have ended."""
    lock = threading.Lock()

    def slot(gpu: str, number: int):
        time.sleep(LEAD * number)
        while True:
            with lock:
                if not lists[gpu]:
                    return
                job = lists[gpu].pop(0)
            job.run(gpu, out)

    threads = [threading.Thread(target=slot, args=(gpu, number)) for gpu in lists for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def words_of(args: argparse.Namespace, folder: str, model: str, lr: float, seed: int, iterations: int) -> list[str]:
    common = f"{model} --data {args.data} --out {args.out / folder} --size {args.size} --lr {lr:g}"
    return [*common.split(), "--seed", str(seed), "--iterations", str(iterations)]


def is_done(args: argparse.Namespace, folder: str, model: str, lr: float, seed: int) -> bool:
    of_run = run_folder(args.out / folder, model, lr, seed)
    return (of_run / "run.json").exists() and read(of_run)["done"]


def sweep(args: argparse.Namespace) -> list[dict]:
    """Run the sweep, and return its runs as draw.py reads them."""
    shared: list[Job] = []
    for lr in args.rates:
        for model in args.models:
            if is_done(args, "sweep", model, lr, SWEEP_SEED):
                continue
            words = words_of(args, "sweep", model, lr, SWEEP_SEED, args.sweep_iterations)
            shared.append(Job(f"sweep-{model}-{lr:g}", [*words, "--no-checkpoints", "--evaluations", "1"]))
    # All GPUs share one list: a GPU that is free takes the next job.
    work({gpu: shared for gpu in args.gpus}, args.out)
    return [run for run in read_all(args.out / "sweep") if run["heldout"] and run["done"]]


def seconds_per_iteration(runs: list[dict], model: str) -> float:
    """Return the seconds of a model's median iteration in the fastest of its runs."""
    found = [run["tokens"] / run["iterations"] / run["tokens_per_second"] for run in runs if run["model"] == model]
    return min(found)


def shared_out(times: list[float], gpus: int) -> list[list[int]]:
    """Return for each GPU the numbers of its runs in their order, so that all GPUs end at about the same time.

    Args:
        times: seconds of an iteration of each run.
        gpus: number of GPUs.
    """
    lists: list[list[int]] = [[] for _ in range(gpus)]
    for number in sorted(range(len(times)), key=lambda number: -times[number]):
        min(lists, key=lambda runs: sum(times[one] for one in runs)).append(number)
    return [sorted(runs) for runs in lists]


def iterations_within(seconds: float, times: list[float], gpus: int) -> int:
    """Return how many iterations each run can have within `seconds`, as a multiple of 16.

    Args:
        seconds: time on every GPU.
        times: seconds of an iteration of each run.
        gpus: number of GPUs.
    """
    lists = [runs for runs in shared_out(times, gpus) if runs]
    counts = [(seconds - AROUND * len(runs)) / sum(times[one] for one in runs) for runs in lists]
    return max(0, int(min(counts))) // 16 * 16


def choose(args: argparse.Namespace, runs: list[dict]) -> dict:
    """Choose learning rates and the length of the full runs, and write choice.json.

    The length is --iterations if it is given, also if the time is too short for it.

    Raises:
        ValueError: no run of the sweep ended, or too little time is left.
    """
    rates = {}
    for model in args.models:
        of_model = [run for run in runs if run["model"] == model]
        if of_model:
            rates[model] = min(of_model, key=last)["lr"]
    if not rates:
        raise ValueError(f"no run of the sweep ended well: see {args.out}/*.console")
    left = SHARE * (args.seconds - (time.monotonic() - START))
    times = {model: seconds_per_iteration(runs, model) for model in rates}
    tokens = runs[0]["tokens"] // runs[0]["iterations"]
    models, seeds, gpus = list(rates), len(args.seeds), len(args.gpus)

    def count_of(models: list[str]) -> int:
        return iterations_within(left, [times[model] for model in models] * seeds, gpus)

    count = args.iterations or count_of(models)
    while not args.iterations and count * tokens < args.least_tokens and len(models) * seeds > gpus and len(models) > 1:
        say(f"{models.pop()} is left out, because all models would not reach {args.least_tokens:,.0f} tokens")
        count = count_of(models)
    if args.most_tokens:
        count = min(count, int(args.most_tokens / tokens) // 16 * 16)
    if count < 16:
        raise ValueError(f"{left:.0f} seconds are left, which is too few: give more --seconds, or a shorter sweep")
    edge = [model for model in models if len(args.rates) > 1 and rates[model] in (min(args.rates), max(args.rates))]
    parameters = {run["model"]: run["parameters"] for run in runs}
    choice = {
        "models": models,
        "seeds": args.seeds,
        "parameters": {model: parameters[model] for model in models},
        "rates": rates,
        "best_rate_at_the_edge_of_the_sweep": edge,
        "milliseconds_per_iteration": {model: round(1000 * times[model], 1) for model in rates},
        "iterations": count,
        "tokens": count * tokens,
        "epochs": round(count * tokens / runs[0]["data"]["train"]["tokens"], 3),
        "seconds_left": round(left),
    }
    (args.out / "choice.json").write_text(json.dumps(choice, indent=1) + "\n")
    say(f"choice: {json.dumps(choice)}")
    return choice


def full(args: argparse.Namespace, choice: dict):
    """Train the chosen models."""
    count, lengths = choice["iterations"], ["--lengths", *map(str, args.lengths)]
    lists: dict[str, list[Job]] = {gpu: [] for gpu in args.gpus}
    runs = [(model, seed) for seed in args.seeds for model in choice["models"]]
    runs = [(model, seed) for model, seed in runs if not is_done(args, "full", model, choice["rates"][model], seed)]
    times = [choice["milliseconds_per_iteration"][model] for model, _ in runs]
    for gpu, numbers in zip(args.gpus, shared_out(times, len(args.gpus)), strict=True):
        for model, seed in (runs[number] for number in numbers):
            words = words_of(args, "full", model, choice["rates"][model], seed, count)
            lists[gpu].append(Job(f"full-{model}-{seed}", [*words, *lengths]))
    work(lists, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that tokens.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["attention", "hgrn2", "hybrid"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--sweep-iterations", type=int, default=100)
    parser.add_argument("--seconds", type=float, required=True, help="for everything, with the sweep")
    parser.add_argument("--iterations", type=int, help="of a full run; the default takes as many as the time allows")
    parser.add_argument("--least-tokens", type=float, default=300e6, help="of a full run; see step 2")
    parser.add_argument("--most-tokens", type=float, help="the most tokens of a full run")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 32768])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        for model in args.models:
            mixer_flags(model, args.size)
            check_packages(model)
        full(args, choose(args, sweep(args)))
    except ValueError as error:
        parser.error(str(error))
    say("all runs have ended")


if __name__ == "__main__":
    main()
