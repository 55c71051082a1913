"""Multi-query associative recall: how many pairs HGRN2, attention and a hybrid keep, by width and expand ratio.

    python benchmarks/quality/mqar.py --out mqar.json [--widths 64 128] [--steps 4000]
        [--workers 4] [--minutes 8]

Trains models of two layers, each by a few learning rates, on one mix of sequence lengths and numbers of pairs, and
prints the accuracy on held-out sequences, by number of pairs, of the learning rate that did best. A model's
learning rates train side by side in one process, and several processes share each GPU. All models see the same
batches in the same order; no sequence comes twice. The JSON file is written anew whenever a model is done, and models
that it already has from the same settings are not trained again.
"""

import argparse
import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from kinds import EXPANDS, PATTERNS, Kind, kinds
from recall import Batch, Size
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# of a batch number that no training step has
HELD_OUT = 1 << 40


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all models of a table share.

    Attributes:
        sizes: (tokens, pairs) of the sequences, which take turns from step to step.
        batch: tokens of a step.
        held_out: sequences of each size that accuracy is measured on, at least one batch.
    """

    sizes: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 32), (512, 64))
    vocab: int = 8192
    batch: int = 16384
    steps: int = 4000
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (1,)
    held_out: int = 1024


TINY = Settings(((8, 2), (16, 4)), vocab=32, batch=512, steps=160, rates=(1e-2,), held_out=256)
WIDTHS = (64, 128, 256, 512)


def train(kind: Kind, settings: Settings, graphs: bool) -> dict:
    """Train a model with each learning rate and seed, side by side; what came of it, as JSON has it."""
    from small_models import Learner, build, draw, start

    start()
    sizes = [Size(*size) for size in settings.sizes]
    count = {size: settings.batch // size.length for size in sizes}
    examples = [draw(size, count[size], settings.vocab, HELD_OUT) for size in dict.fromkeys(sizes)]
    learners = {}
    for seed in settings.seeds:
        for rate in settings.rates:
            model = build(kind, settings.vocab, max(size.length for size in sizes), seed)
            learners[seed, rate] = Learner(model, rate, settings.steps, examples, graphs)
    begin = time.perf_counter()
    for step in range(settings.steps):
        size = sizes[step % len(sizes)]
        batch = draw(size, count[size], settings.vocab, step)
        for learner in learners.values():
            learner.learn(batch)
    if ON_GPU:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    held_out = {
        size: [
            draw(size, count[size], settings.vocab, HELD_OUT + number)
            for number in range(max(1, settings.held_out // count[size]))
        ]
        for size in sizes
    }
    return {
        **dataclasses.asdict(kind),
        "mixer": kind.mixer,
        "parameters": sum(p.numel() for p in model.parameters()),
        "without_embeddings": sum(p.numel() for name, p in model.named_parameters() if "embedding" not in name),
        "state": kind.state,
        "seconds": round(seconds, 1),
        "runs": [
            {
                "seed": seed,
                "rate": rate,
                "accuracy": {str(size.pairs): learner.accuracy(batches) for size, batches in held_out.items()},
                "curve": curve(learner.history, sizes),
            }
            for (seed, rate), learner in learners.items()
        ],
    }


def compile_kernels(order: list[Kind], settings: Settings):
    """Run each HGRN2 model forward and backward once for each size, which compiles its kernels, and no more."""
    from small_models import DTYPE, Recaller, build, start

    start()
    for kind in order:
        if kind.pattern != "H":
            # a hybrid has the same kernels, and attention none of Triton
            continue
        sizes = [Size(*size) for size in settings.sizes]
        model = Recaller(build(kind, settings.vocab, max(size.length for size in sizes), 1).to(DTYPE))
        for size in sizes:
            count = settings.batch // size.length
            shapes = [(count, size.length), (count, size.pairs), (count, size.pairs)]
            model.gradients(Batch(*(torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in shapes)))


def curve(history: Tensor, sizes: list[Size], points: int = 20) -> dict[str, list]:
    """Number of pairs -> [last step, mean loss, mean accuracy] of each twentieth of the training, [steps, 2]."""
    found = {}
    for number, size in enumerate(sizes):
        rows = history[number :: len(sizes)].double().cpu()
        pieces = [piece for piece in rows.tensor_split(points) if len(piece)]
        ends = [sum(map(len, pieces[: i + 1])) * len(sizes) for i in range(len(pieces))]
        means = [piece.mean(0).tolist() for piece in pieces]
        # JSON has no NaN
        found[str(size.pairs)] = [
            [end, round(loss, 4) if loss == loss else None, round(right, 4)]
            for end, (loss, right) in zip(ends, means, strict=True)
        ]
    return found


def mean_accuracy(run: dict) -> float:
    return statistics.mean(run["accuracy"].values())


def best(model: dict) -> dict[str, float | None]:
    """The learning rate with the best mean over sizes and seeds, and its accuracy for each number of pairs."""
    by_rate: dict[float, list[dict]] = {}
    for run in model["runs"]:
        by_rate.setdefault(run["rate"], []).append(run)
    rate, runs = max(by_rate.items(), key=lambda item: statistics.mean(map(mean_accuracy, item[1])))
    found = {pairs: statistics.mean(run["accuracy"][pairs] for run in runs) for pairs in runs[0]["accuracy"]}
    return {"rate": rate, **found}


def table(results: dict) -> str:
    """The models as lines of Markdown, in the order of the list."""
    pairs = [str(pairs) for _, pairs in results["settings"]["sizes"]]
    lines = [
        "| width | mixer | parameters without embeddings | state | learning rate | "
        + " | ".join(f"{number} pairs" for number in pairs)
        + " | seconds |",
        "|---" * (6 + len(pairs)) + "|",
    ]
    for model in results["models"]:
        found = best(model)
        cells = " | ".join(f"{100 * found[number]:.1f}" for number in pairs)
        lines.append(
            f"| {model['width']} | {model['mixer']} | {model['without_embeddings']:,} | {model['state']:,} | "
            f"{found['rate']:g} | {cells} | {model['seconds']:.0f} |"
        )
    return "\n".join(lines)


class Results:
    """The JSON file: settings, machine, and the models that are done.

    Args:
        out: the file; models in it stay if it has the same settings and machine.
        settings: of all models.
        order: the models of the table, in its order.
    """

    def __init__(self, out: Path, settings: Settings, order: list[Kind]):
        self.out, self.order = out, order
        machine = {
            "device": torch.cuda.get_device_name() if ON_GPU else "CPU",
            **{name: importlib.metadata.version(name) for name in ("torch", "triton", "megatron-core")},
        }
        # as JSON gives it back
        self.head = json.loads(json.dumps({"settings": dataclasses.asdict(settings), "machine": machine}))
        self.models: dict[Kind, dict] = {}
        if out.exists():
            before = json.loads(out.read_text())
            if {name: before[name] for name in self.head} != self.head:
                raise SystemExit(f"{out} is of other settings or another machine: give another --out, or delete it")
            for model in before["models"]:
                self.models[Kind(model["pattern"], model["width"], model["expand"])] = model

    @property
    def missing(self) -> list[Kind]:
        return [kind for kind in self.order if kind not in self.models]

    def add(self, kind: Kind, model: dict):
        self.models[kind] = model
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.all(), indent=1) + "\n")

    def all(self) -> dict:
        rest = [kind for kind in self.models if kind not in self.order]
        return {**self.head, "models": [self.models[kind] for kind in [*self.order, *rest] if kind in self.models]}


def train_apart(kind: Kind, argv: list[str], devices: queue.Queue, until: float) -> dict:
    """Train one model in a process of its own, on one of the devices.

    Returns:
        What `train` gives.

    Raises:
        RuntimeError: it failed, or there is no time left; the end of what it printed.
    """
    device = devices.get()
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            command = [sys.executable, __file__, *argv, "--one", kind.pattern, str(kind.width), str(kind.expand)]
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
            left = until - time.monotonic()
            if left <= 0:
                raise RuntimeError("no time was left")
            done = subprocess.run(
                [*command, "--out", str(answer)],
                env=env, timeout=left, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            if done.returncode or not answer.exists():
                raise RuntimeError(f"exit status {done.returncode}\n{done.stdout[-3000:]}")
            return json.loads(answer.read_text())
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("ended: no time was left") from error
    finally:
        devices.put(device)


def visible_devices(workers: int) -> queue.Queue:
    """A device's name for each worker, all devices in turn; empty names where there is no choice."""
    count = torch.cuda.device_count() if ON_GPU else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    devices: queue.Queue = queue.Queue()
    for worker in range(workers):
        devices.put(names[worker % count] if count > 1 else "")
    return devices


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--expand-ratios", type=int, nargs="+", default=EXPANDS, help="those that divide a width")
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS, help="attention, hybrid, HGRN2")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, the same for each model")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the weights; batches are the same")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--workers", type=int, default=4, help="processes at a time, which share the GPUs")
    parser.add_argument("--minutes", type=float, default=600, help="what is not done by then is ended and named")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a toy size, for a CPU")
    parser.add_argument("--compile", action="store_true", help="compile the kernels and stop; see compile_for_gpu.py")
    parser.add_argument("--one", nargs=3, metavar=("PATTERN", "WIDTH", "EXPAND"), help="train this model only, here")
    return parser


def main():
    parser = command_line()
    args, argv = parser.parse_args(), sys.argv[1:]
    given = {name: tuple(value) for name in ("rates", "seeds") if (value := getattr(args, name))}
    if args.steps:
        given["steps"] = args.steps
    settings = dataclasses.replace(TINY if args.tiny else Settings(), **given)
    if args.one:
        kind = Kind(args.one[0], *map(int, args.one[1:]))
        args.out.write_text(json.dumps(train(kind, settings, ON_GPU and not args.no_graphs)))
        return
    try:
        order = kinds(tuple(args.widths), tuple(args.expand_ratios), tuple(args.patterns))
    except ValueError as error:
        parser.error(str(error))
    if args.compile:
        compile_kernels(order, settings)
        return
    results = Results(args.out, settings, order)
    devices, until, failed = visible_devices(args.workers), time.monotonic() + 60 * args.minutes, []
    with concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
        # the longest first
        jobs = {
            pool.submit(train_apart, kind, argv, devices, until): kind
            for kind in sorted(results.missing, key=lambda kind: -kind.width)
        }
        for job in concurrent.futures.as_completed(jobs):
            kind = jobs[job]
            name = f"width {kind.width}, {kind.mixer}"
            try:
                results.add(kind, job.result())
            except RuntimeError as error:
                failed.append(name)
                print(f"{name}: {error}", flush=True)
                continue
            found = results.models[kind]
            runs = ", ".join(f"{run['rate']:g}: {100 * mean_accuracy(run):.1f}%" for run in found["runs"])
            print(f"{name}: {found['seconds']:.0f} s; mean accuracy by learning rate {runs}", flush=True)
    print(f"\n{table(results.all())}")
    if failed:
        sys.exit(f"not done: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
