"""Multi-query associative recall: how many pairs HGRN2, attention and a hybrid keep, by width and expand ratio.

    python benchmarks/quality/mqar.py --out mqar.json [--widths 128 64] [--steps 6000]
        [--workers 6] [--minutes 9]

The program trains models of two layers on one mix of sequence lengths and numbers of pairs. Each model is trained with
a few learning rates and seeds, and the table shows its accuracy on held-out sequences at the learning rate that did
best. All runs of a model train side by side in one process, and several processes share each GPU. All models see the
same batches in the same order, and no sequence comes twice.

Models are trained in the order of --widths, so name the most important width first. The program writes the JSON file
again whenever a model is done, and it does not repeat models that the file already has with the same settings.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from kinds import EXPANDS, PATTERNS, Kind, kinds
from mqar_results import Results, mean_accuracy, table
from recall import Batch, Size
from torch import Tensor

ON_GPU = torch.cuda.is_available()
# Held-out batches are numbered from here, which is beyond every training step.
HELD_OUT = 1 << 40
# Seconds from one line about the progress to the next.
PROGRESS = 30


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that all models of a table share.

    Attributes:
        sizes: (tokens, pairs) of the sequences. The sizes take turns from step to step.
        vocab: tokens in the vocabulary, of which half are keys and half are values.
        batch: tokens in a step.
        steps: length of the training.
        rates: highest learning rates to try.
        seeds: seeds of the initial weights.
        held_out: sequences of each size that accuracy is measured on. It is at least one batch.
    """

    sizes: tuple[tuple[int, int], ...] = ((64, 4), (128, 8), (256, 16), (512, 32), (512, 64))
    vocab: int = 8192
    batch: int = 16384
    steps: int = 6000
    rates: tuple[float, ...] = (1e-3, 3e-3, 6e-3)
    seeds: tuple[int, ...] = (1, 2)
    held_out: int = 1024


TINY = Settings(((8, 2), (16, 4)), vocab=32, batch=512, steps=160, rates=(1e-2,), seeds=(1,), held_out=256)
WIDTHS = (64, 128, 256, 512)


def train(kind: Kind, settings: Settings, graphs: bool) -> dict:
    """Train a model with each learning rate and seed, side by side, and return the results for the JSON."""
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
    """Run each HGRN2 model forward and backward once for each size, which compiles its kernels."""
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


def train_apart(kind: Kind, argv: list[str], devices: queue.Queue, until: float) -> dict:
    """Train one model in a process of its own, on one of the devices.

    Returns:
        The results of `train`.

    Raises:
        RuntimeError: the process failed, and the message has the end of what it printed; or no time is left.
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


def train_all(results: Results, argv: list[str], workers: int, seconds: float) -> list[str]:
    """Train the models that are missing, several at a time, and return the names of those that were not done.

    Args:
        results: gets each model as soon as it is done.
        argv: this program's arguments, which each process gets too.
        workers: processes at a time.
        seconds: what is not done by then is ended.
    """
    begin, failed, order = time.monotonic(), [], results.missing
    devices = visible_devices(workers)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(train_apart, kind, argv, devices, begin + seconds): kind for kind in order}
        waiting = set(jobs)
        while waiting:
            ended, waiting = concurrent.futures.wait(waiting, PROGRESS, concurrent.futures.FIRST_COMPLETED)
            for job in ended:
                kind = jobs[job]
                name = f"width {kind.width}, {kind.mixer}"
                try:
                    results.add(kind, job.result())
                except RuntimeError as error:
                    failed.append(name)
                    print(f"{name}: {error}", flush=True)
                    continue
                model = results.models[kind]
                runs = ", ".join(f"{run['rate']:g}: {100 * mean_accuracy(run):.1f}%" for run in model["runs"])
                print(f"{name}: {model['seconds']:.0f} s; mean accuracy by learning rate {runs}", flush=True)
            done = len(jobs) - len(waiting)
            print(f"after {time.monotonic() - begin:.0f} s: {done} of {len(jobs)} models have ended", flush=True)
    return failed


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="in the order of training")
    parser.add_argument(
        "--expand-ratios", type=int, nargs="+", default=EXPANDS, help="a width has those that divide it"
    )
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=PATTERNS, help="attention, hybrid, HGRN2")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, the same for each model")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of the weights; batches stay the same")
    parser.add_argument("--steps", type=int, help="length of the training")
    parser.add_argument("--workers", type=int, default=4, help="processes at a time, which share the GPUs")
    parser.add_argument("--minutes", type=float, default=600, help="models not done by then are ended and named")
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
    results = Results(args.out, dataclasses.asdict(settings), order)
    failed = train_all(results, argv, args.workers, 60 * args.minutes)
    print(f"\n{table(results.all())}")
    if failed:
        sys.exit(f"not done: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
