"""The results of a benchmark as a JSON file, which scripts/tables.py turns into the tables of the documentation."""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import shlex
import sys
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformer-engine", "megatron-core", "fla-core")


def json_file(name: str) -> Path:
    """Return the path of a file of results. Refuse a name without .json before anything runs."""
    if not name.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{name!r} does not end in .json: name the file of results")
    return Path(name)


def add_option(parser: argparse.ArgumentParser):
    """Add --out, the file of results, to a command line."""
    parser.add_argument("--out", type=json_file, metavar="FILE.json", help="write the results to this file")


def machine() -> str:
    """Return the number of GPUs of this host and their name, or the number of CPU cores if there is no GPU."""
    if not torch.cuda.is_available():
        return f"{os.cpu_count()} CPU cores"
    return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that the results depend on."""
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def command() -> str:
    """Return the command of this process as it was typed, without the path of Python."""
    processes = os.environ.get("WORLD_SIZE")
    launcher = f"torchrun --nproc_per_node {processes}" if processes else "python"
    # sys.argv may have changed since the start; torchrun adds -u
    return f"{launcher} {shlex.join(word for word in sys.orig_argv[1:] if word != '-u')}"


def write(path: Path | None, rows: list[dict], **more):
    """Write rows together with the date, machine, versions and command of the run.

    Args:
        path: the file, or None to write nothing.
        rows: one dictionary for each row of a table, from the name of a column to its value.
        more: other results of the run.
    """
    if path:
        head = dict(date=datetime.date.today().isoformat(), machine=machine(), versions=versions(), command=command())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(head | more | dict(rows=rows), indent=1) + "\n")
