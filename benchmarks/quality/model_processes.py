"""Train the models of a table, each in a process of its own, and write their results: the main part of mqar.py,
needle.py and state_tracking.py."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from batches import ON_GPU
from kinds import Kind
from results import Results, table
from tasks import compile_kernels

# Seconds from one line about the progress to the next.
PROGRESS = 30


def add_options(parser: argparse.ArgumentParser):
    """Add the arguments that the programs share."""
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, the same for each model")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of the weights; batches stay the same")
    parser.add_argument("--steps", type=int, help="length of the training")
    parser.add_argument("--workers", type=int, default=4, help="processes at a time, which share the GPUs")
    parser.add_argument("--minutes", type=float, default=600, help="models not done by then are ended and named")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--tiny", action="store_true", help="a toy size, for a CPU")
    parser.add_argument("--compile", action="store_true", help="compile the kernels and stop; see compile_for_gpu.py")
    parser.add_argument("--one", metavar="JSON", help="train this model only, in this process")


def given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return the settings that were given as arguments, with tuples for lists."""
    found = {name: getattr(args, name) for name in ("rates", "seeds", "steps", *names)}
    return {name: tuple(x) if isinstance(x, list) else x for name, x in found.items() if x is not None}


def run(
    args: argparse.Namespace,
    task: Any,
    order: list[Kind],
    train: Callable[[Kind, Any, bool], dict],
    rows: Callable[[dict], list[dict[str, str]]],
):
    """Train the models that are not in --out yet, and print the table. With --compile, only compile their kernels.

    Args:
        args: the command line, which `add_options` has extended.
        task: a dataclass with the settings that all models share.
        order: the models of the table.
        train: trains one model, on CUDA graphs or not, and returns its results.
        rows: returns the rows of the table.

    Raises:
        SystemExit: models were not done, and the message names them.
    """
    if args.compile:
        compile_kernels(order, task)
        return
    if args.one:
        found = train(Kind(**json.loads(args.one)), task, ON_GPU and not args.no_graphs)
        args.out.write_text(json.dumps(found))
        return
    results = Results(args.out, dataclasses.asdict(task), order, rows)
    failed = _train_all(results, args.workers, 60 * args.minutes)
    print(f"\n{table(results.all()['rows'])}")
    if failed:
        sys.exit(f"not done: {'; '.join(failed)}")


def _train_all(results: Results, workers: int, seconds: float) -> list[str]:
    """Train the models that are missing, several at a time, and return the names of those that were not done.

    Args:
        results: gets each model as soon as it is done.
        workers: processes at a time.
        seconds: what is not done by then is ended.
    """
    begin, failed, order = time.monotonic(), [], results.missing
    devices = _visible_devices(workers)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(_train_apart, kind, devices, begin + seconds): kind for kind in order}
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
                print(f"{name}: trained in {results.models[kind]['seconds']:.0f} s", flush=True)
            done = len(jobs) - len(waiting)
            print(f"after {time.monotonic() - begin:.0f} s: {done} of {len(jobs)} models have ended", flush=True)
    return failed


def _train_apart(kind: Kind, devices: queue.Queue, until: float) -> dict:
    """Train one model in a process of its own, on one of the devices, and return its results.

    Raises:
        RuntimeError: the process failed, and the message has the end of what it printed; or no time is left.
    """
    device = devices.get()
    try:
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "answer.json"
            one = json.dumps(dataclasses.asdict(kind))
            # The last --out is the one that counts.
            command = [sys.executable, *sys.argv, "--one", one, "--out", str(answer)]
            env = os.environ | ({"CUDA_VISIBLE_DEVICES": device} if device else {})
            left = until - time.monotonic()
            if left <= 0:
                raise RuntimeError("no time was left")
            done = subprocess.run(
                command, env=env, timeout=left, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            if done.returncode or not answer.exists():
                raise RuntimeError(f"exit status {done.returncode}\n{done.stdout[-3000:]}")
            return json.loads(answer.read_text())
    except subprocess.TimeoutExpired as error:
        raise RuntimeError("ended: no time was left") from error
    finally:
        devices.put(device)


def _visible_devices(workers: int) -> queue.Queue:
    """Return a device's name for each worker, all devices in turn; empty names where there is no choice."""
    count = torch.cuda.device_count() if ON_GPU else 0
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(count)]
    devices: queue.Queue = queue.Queue()
    for worker in range(workers):
        devices.put(names[worker % count] if count > 1 else "")
    return devices
