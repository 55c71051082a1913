"""Sweep the learning rate of each model, then train each model with its best rate, on all GPUs and in a given time.

    python benchmarks/quality/side_by_side.py --data data --out runs --gpus 0 1 --seconds 1200

Every run is a process of train.py. Two runs share a GPU: one trains while the next starts up and waits for its turn.
The program reports a run that fails and goes on with the others. Call it again, and it leaves out what is done.

1. The sweep trains each model with each learning rate for --sweep-iterations, without checkpoints. Its folder is
   runs/sweep.
2. The choice takes for each model the rate with the lowest held-out loss. All models get the same number of iterations,
   as many as the rest of the time allows at the speeds that the sweep measured. If all models together do not reach
   --least-tokens, but the others do without the last one, the last one is left out. The choice is in runs/choice.json.
3. The full runs train one model per GPU, in runs/full. If there is one model more than GPUs, its first half trains on
   the last GPU before that GPU's own model. Its second half trains on the first GPU after that GPU's own model.

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
from train import MODELS, SIZES, run_folder

HERE = Path(__file__).resolve().parent
# Seconds of a full run that are no iterations: its start, evaluations, the checkpoint, and the losses by position.
AROUND = 60
# The full runs get this share of the time that is left, because an iteration can take longer than in the sweep.
SHARE = 0.95
# A GPU's first run starts this many seconds before its second, so that it takes its turn first.
LEAD = 10
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
        after: jobs that have to end without a failure before this one starts.
        ended: is set when the job has ended.
        failed: the job failed or could not start.
    """

    name: str
    words: list[str]
    after: list["Job"] = dataclasses.field(default_factory=list)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)
    failed: bool = False

    def run(self, gpu: str, out: Path):
        """Wait for the jobs before this one, and run it on a GPU."""
        for job in self.after:
            job.ended.wait()
        if any(job.failed for job in self.after):
            self.failed = True
            say(f"{self.name}: not started, because the run before it failed")
        else:
            self._run(gpu, out)
        self.ended.set()

    def _run(self, gpu: str, out: Path):
        console = out / f"{self.name}.console"
        say(f"{self.name}: starts on GPU {gpu}")
        command = [sys.executable, str(HERE / "train.py"), *self.words, "--turn", str(out / f"turn.{gpu}")]
        with open(console, "w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu}
            )
        self.failed = done.returncode != 0
        tail = console.read_text(errors="replace").splitlines()[-15 if self.failed else -2 :]
        say(f"{self.name}: {'FAILED' if self.failed else 'ends'}: " + (" | ".join(tail) if not self.failed else ""))
        if self.failed:
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


def words_of(args: argparse.Namespace, folder: str, model: str, lr: float, iterations: int) -> list[str]:
    common = f"{model} --data {args.data} --out {args.out / folder} --size {args.size} --lr {lr:g}"
    return [*common.split(), "--seed", str(args.seed), "--iterations", str(iterations)]


def is_done(args: argparse.Namespace, folder: str, model: str, lr: float) -> bool:
    of_run = run_folder(args.out / folder, model, lr, args.seed)
    return (of_run / "run.json").exists() and read(of_run)["done"]


def sweep(args: argparse.Namespace) -> list[dict]:
    """Run the sweep, and return its runs as draw.py reads them."""
    shared: list[Job] = []
    for lr in args.rates:
        for model in args.models:
            words = words_of(args, "sweep", model, lr, args.sweep_iterations)
            if is_done(args, "sweep", model, lr):
                continue
            shared.append(Job(f"sweep-{model}-{lr:g}", [*words, "--no-checkpoints", "--evaluations", "1"]))
    # All GPUs share one list: a GPU that is free takes the next job.
    work({gpu: shared for gpu in args.gpus}, args.out)
    return [run for run in read_all(args.out / "sweep") if run["heldout"] and run["done"]]


def seconds_per_iteration(runs: list[dict], model: str) -> float:
    """Return the seconds of a model's median iteration in the fastest of its runs."""
    found = [run["tokens"] / run["iterations"] / run["tokens_per_second"] for run in runs if run["model"] == model]
    return min(found)


def iterations_within(seconds: float, times: list[float], gpus: int) -> int:
    """Return how many iterations each model can have within `seconds`, as a multiple of 16.

    Args:
        seconds: time on every GPU.
        times: seconds of an iteration of each model. One model more than `gpus` is split into two halves.
        gpus: number of GPUs.
    """
    own, split = times[:gpus], times[gpus:]
    on_each = [[one] for one in own]
    for one in split:
        on_each[0].append(one / 2)
        on_each[-1].append(one / 2)
    # The second half starts when the first has ended and when the first GPU's own model is done.
    slowest = max([sum(one) for one in on_each] + [own[0] + one / 2 for one in split])
    jobs = max(len(one) for one in on_each)
    return max(0, int((seconds - AROUND * jobs) / slowest)) // 16 * 16


def choose(args: argparse.Namespace, runs: list[dict]) -> dict:
    """Choose learning rates and the length of the full runs, and write choice.json.

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
    models = list(rates)[: len(args.gpus) + 1]
    count = iterations_within(left, [times[model] for model in models], len(args.gpus))
    if count * tokens < args.least_tokens and len(models) > len(args.gpus):
        models = models[: len(args.gpus)]
        count = iterations_within(left, [times[model] for model in models], len(args.gpus))
    if args.most_tokens:
        count = min(count, int(args.most_tokens / tokens) // 16 * 16)
    if count < 16:
        raise ValueError(f"{left:.0f} seconds are left, which is too few: give more --seconds, or a shorter sweep")
    edge = [model for model in models if len(args.rates) > 1 and rates[model] in (min(args.rates), max(args.rates))]
    choice = {
        "models": models,
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
    for number, model in enumerate(choice["models"]):
        words = words_of(args, "full", model, choice["rates"][model], count)
        if is_done(args, "full", model, choice["rates"][model]):
            continue
        if number < len(args.gpus):
            lists[args.gpus[number]].append(Job(f"full-{model}", [*words, *lengths]))
        else:
            half = ["--", "--exit-interval", str(count // 2)]
            first = Job(f"full-{model}-first", [*words, *half])
            lists[args.gpus[-1]].insert(0, first)
            lists[args.gpus[0]].append(Job(f"full-{model}-second", [*words, *lengths], after=[first]))
    work(lists, args.out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that tokens.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["attention", "hgrn2", "hybrid"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5e-4, 1e-3, 2e-3])
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument("--size", choices=SIZES, default="125m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sweep-iterations", type=int, default=100)
    parser.add_argument("--seconds", type=float, required=True, help="for everything, with the sweep")
    parser.add_argument("--least-tokens", type=float, default=300e6, help="of a full run; see step 2")
    parser.add_argument("--most-tokens", type=float, help="the most tokens of a full run")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 32768])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        full(args, choose(args, sweep(args)))
    except ValueError as error:
        parser.error(str(error))
    say("all runs have ended")


if __name__ == "__main__":
    main()
