"""Measure tokens/s of Megatron-LM's pretraining on one GPU: attention, HGRN2 and a hybrid, by length and precision.

    python benchmarks/pretrain.py path/to/Megatron-LM [--rows ROW ...] [--profile --logs FOLDER] [--out FILE.json]
        [-- more flags]

The benchmark runs the unmodified pretrain_gpt.py on mock data once for each row and prints one table. The model has 24
layers of 2048, 16 heads, a GLU of 5632 and a vocabulary of 32000. An iteration has 32768 tokens, in bf16 with
Transformer Engine and the distributed optimizer. Rows of one length have the same flags, except for what their names
say. "Relative to attention" divides by the attention row of the same length and precision in the same run. Rates are
from the median iteration after the first two. --profile writes a table of the kernels of one iteration and their times
into FOLDER.
"""

import argparse
import collections
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

import report
from figures import Figures, failure
from models import ATTENTION, FULL, GPU, GRAPH, HGRN2, HYBRID, LOOP, MODELS, SELECTIVE, SIZE
from runs import command_line, file_stem, make_table, parse, run, script_in

TOKENS = 32768

COMMON = f"""
    {SIZE} {LOOP} {GPU} --use-distributed-optimizer --train-iters 12 --lr 3e-4 --no-create-attention-mask-in-dataloader
""".split()

# setting of a row -> length in tokens, micro-batch in sequences, more flags
SETTINGS: dict[str, tuple[int, int, list[str]]] = {
    "4096": (4096, 4, []),
    "4096 graph": (4096, 4, GRAPH),
    "4096 by one": (4096, 1, []),
    "4096 by one graph": (4096, 1, GRAPH),
    "4096 FP8": (4096, 4, ["--fp8-format", "hybrid", "--fp8-recipe", "delayed"]),
    "16384 selective": (16384, 1, SELECTIVE),
    "16384": (16384, 1, []),
    "16384 graph": (16384, 1, GRAPH),
    "32768 full": (32768, 1, FULL),
    "32768 selective": (32768, 1, SELECTIVE),
    "32768": (32768, 1, []),
}
ROWS = [f"{model}, {setting}" for setting in SETTINGS for model in (ATTENTION, HGRN2)]
ROWS += [f"{HYBRID}, {setting}" for setting in ("4096", "16384 selective", "32768 full")]
PROFILE = "--profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 11 --profile-ranks 0".split()


def command_of(name: str) -> tuple[bool, list[str]]:
    """Return whether the launcher starts the script of a row, and the flags of the row."""
    model, setting = name.split(", ")
    launcher, flags = MODELS[model]
    length, micro_batch, more = SETTINGS[setting]
    size = f"""
        --seq-length {length} --max-position-embeddings {length}
        --micro-batch-size {micro_batch} --global-batch-size {TOKENS // length}
    """.split()
    return launcher, [*COMMON, *size, *flags, *more]


def result(name: str, log: str, found: Figures | None, beside: Figures | None) -> dict:
    """Return the results of a row, or why its run failed.

    Args:
        name: name of the row.
        log: output of Megatron.
        found: the figures in the log, or None if the run failed.
        beside: the figures of attention, or None if there are none.
    """
    if found is None:
        return {"run": name, "note": failure(log)}
    return {
        "run": name,
        "tokens/s": round(found.rate),
        "relative to attention": round(found.rate / beside.rate, 2) if beside else None,
        "peak GiB": round(found.peak, 1),
        "loss, first -> last": f"{found.losses[0]:.3f} -> {found.losses[-1]:.3f}",
        "banner": next(iter(re.findall(r"^HGRN2: .*", log, re.M)), ""),
        "losses": found.losses,
    }


def line(row: dict) -> str:
    """Return the line of the table for a result."""
    if "note" in row:
        return f"| {row['run']} | {row['note']} | | | | |"
    ratio = "" if row["relative to attention"] is None else f"{row['relative to attention']:.2f}"
    first = f"| {row['run']} | {row['tokens/s']:,} | {ratio} | {row['peak GiB']:.1f} |"
    return f"{first} {row['loss, first -> last']} | {row['banner']} |"


def kernel_table(folder: Path) -> str:
    """Return a table of an iteration's kernels by their time, from the trace of torch's profiler in a folder."""
    (trace,) = folder.rglob("*.json*")
    read = gzip.open if trace.suffix == ".gz" else open
    with read(trace, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    times, counts = collections.Counter(), collections.Counter()
    for event in events:
        times[event["name"]] += event["dur"]
        counts[event["name"]] += 1
    busy = times.total()
    span = max(e["ts"] + e["dur"] for e in events) - min(e["ts"] for e in events)
    lines = [f"{busy / 1000:.1f} ms of kernels within {span / 1000:.1f} ms", "", "| ms | share | times | kernel |"]
    lines += ["|---|---|---|---|"]
    for name, time in times.most_common(40):
        lines.append(f"| {time / 1000:.2f} | {time / busy:.1%} | {counts[name]} | `{name[:120]}` |")
    return "\n".join(lines) + "\n"


def measure(script: Path, args: argparse.Namespace, results: list[dict]) -> Iterator[tuple[str, str, str]]:
    """Run each row, add its result to `results`, and yield its name, its log and its line of the table."""
    attention: dict[str, Figures | None] = {}
    for name in args.rows:
        launcher, flags = command_of(name)
        traces = args.logs / "traces" / file_stem(name) if args.profile else None
        if traces:
            # Megatron writes the trace beside this folder
            flags += [*PROFILE, "--tensorboard-dir", str(traces / "tensorboard")]
        log = run(script, launcher, [*flags, *args.extra])
        found = Figures.of(log, TOKENS, 1, warm_up=2)
        model, setting = name.split(", ")
        if model == ATTENTION:
            attention[setting] = found
        results.append(result(name, log, found, attention.get(setting)))
        yield name, log, line(results[-1])
        # a run that failed may have left no trace
        if traces and found:
            (args.logs / f"{traces.name}.kernels.md").write_text(kernel_table(traces))


def main():
    parser = command_line(__doc__)
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, metavar="ROW", help=f"rows to run, of these: {'; '.join(ROWS)}"
    )
    parser.add_argument("--profile", action="store_true", help="also write the kernels of one iteration; needs --logs")
    args = parse(parser)
    if args.profile and not args.logs:
        parser.error("--profile writes into a folder: add --logs FOLDER")
    head = [
        "| run | tokens/s | relative to attention | peak GiB | loss, first -> last | banner |",
        "|---|---|---|---|---|---|",
    ]
    results: list[dict] = []
    try:
        make_table(head, measure(script_in(args.megatron_lm), args, results), args.logs)
    finally:
        report.write(args.out, results)


if __name__ == "__main__":
    main()
