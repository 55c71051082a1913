"""Measure tokens/s of Megatron's pretraining on one GPU: attention, HGRN2 in both forms of the model, and a hybrid.

    python benchmarks/pretrain.py path/to/Megatron-LM [--rows ROW ...] [--profile --logs FOLDER] [--out FILE.json]
        [-- more flags]

The benchmark runs the unmodified pretrain_gpt.py or pretrain_hybrid.py on mock data for each row and prints one table.
The folder may also be examples/, whose scripts need no checkout. The model has 24 layers of 2048, 16 heads, a GLU of
5632 and a vocabulary of 32000. "HybridModel" is the same function as "HGRN2", a GPT. An iteration has 32768 tokens, in
bf16 with Transformer Engine and the distributed optimizer. Rows of one length have the same flags, except for what
their names say. A rate is from the median iteration after the first two. --rows may name a row several times, so that
rows take turns. Its rate is then the median of its runs. "Relative to" divides by the rate of the row of attention or
of HGRN2 that has the same length and precision in the same call. --profile writes a table of the kernels of one
iteration and their times into FOLDER.
"""

import argparse
import collections
import gzip
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import report
from figures import Figures, failure, numbers
from models import (
    ATTENTION,
    ATTENTION_HEAD,
    FULL,
    GPU,
    GRAPH,
    HGRN2,
    HGRN2_HEAD,
    HYBRID,
    LOOP,
    MODELS,
    SELECTIVE,
    SIZE,
    STACK,
)
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
ROWS += [f"{model}, 4096" for model in (STACK, ATTENTION_HEAD, HGRN2_HEAD)]
# Rows that are run only if --rows names them. Those of fine-grained offloading need NVTE_CPU_OFFLOAD_V1=1.
OFFLOAD = "--fine-grained-activation-offloading --offload-modules".split()
OPTIMIZER = "--use-precision-aware-optimizer"
SETTINGS |= {
    "16384 offload": (16384, 1, [*OFFLOAD, "qkv_linear", "core_attn", "attn_proj"]),
    "16384 offload core": (16384, 1, [*OFFLOAD, "core_attn"]),
    "16384 offload layers": (16384, 1, ["--cpu-offloading-num-layers", "12"]),
    "4096 optimizer": (4096, 4, [OPTIMIZER]),
    "4096 offload optimizer": (4096, 4, [OPTIMIZER, *"--optimizer-cpu-offload --optimizer-offload-fraction 1".split()]),
}
PROFILE = "--profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 11 --profile-ranks 0".split()


def command_of(name: str) -> tuple[str, bool, list[str]]:
    """Return Megatron's script of a row, whether the launcher starts it, and the flags of the row."""
    model, setting = name.split(", ")
    launcher, flags, script = MODELS[model]
    length, micro_batch, more = SETTINGS[setting]
    size = f"""
        --seq-length {length} --max-position-embeddings {length}
        --micro-batch-size {micro_batch} --global-batch-size {TOKENS // length}
    """.split()
    return script, launcher, [*COMMON, *size, *flags, *more]


def rate_of(runs: list[Figures | None]) -> float | None:
    """Return the median of the tokens/s of a row's runs, or None if none of them finished."""
    rates = [found.rate for found in runs if found]
    return statistics.median(rates) if rates else None


def result(name: str, log: str, runs: dict[str, list[Figures | None]]) -> dict:
    """Return the results of a row, or why its run failed.

    Args:
        name: name of the row.
        log: output of the row's last run.
        runs: for each row, the figures of its runs so far, or None for a run that failed.
    """
    model, setting = name.split(", ")
    rate = rate_of(runs[name])
    if rate is None:
        return {"run": name, "note": failure(log)}
    found = next(found for found in runs[name] if found)
    row = {"run": name, "tokens/s": round(rate)}
    for other in (ATTENTION, HGRN2):
        beside = rate_of(runs.get(f"{other}, {setting}", []))
        row[f"relative to {other}"] = round(rate / beside, 3) if beside and model != other else None
    if len(runs[name]) > 1:
        row["tokens/s of each run"] = [found and round(found.rate) for found in runs[name]]
    row |= {
        "peak GiB": round(found.peak, 1),
        "loss, first -> last": f"{found.losses[0]:.3f} -> {found.losses[-1]:.3f}",
        "banner": next(iter(re.findall(r"^HGRN2: .*", log, re.M)), ""),
        "losses": found.losses,
    }
    heads = numbers(r"mtp_1 loss", log)
    return row | ({"losses of the MTP head": heads} if heads else {})


def line(row: dict) -> str:
    """Return the line of the table for a result."""
    if "note" in row:
        return f"| {row['run']} | {row['note']} | | | | | |"
    ratios = [row[f"relative to {other}"] for other in (ATTENTION, HGRN2)]
    first = " | ".join([row["run"], f"{row['tokens/s']:,}", *("" if x is None else f"{x:.3f}" for x in ratios)])
    return f"| {first} | {row['peak GiB']:.1f} | {row['loss, first -> last']} | {row['banner']} |"


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


def measure(folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Run each row, write the results, and yield the name of the run, its log and its line of the table.

    Args:
        folder: folder of Megatron's scripts.
        args: command line of this program.
    """
    runs: dict[str, list[Figures | None]] = {}
    results: dict[str, dict] = {}
    for row in args.rows:
        script, launcher, flags = command_of(row)
        number = len(runs.setdefault(row, [])) + 1
        name = f"{row}, run {number}" if args.rows.count(row) > 1 else row
        traces = args.logs / "traces" / file_stem(name) if args.profile else None
        if traces:
            # Megatron writes the trace beside this folder
            flags += [*PROFILE, "--tensorboard-dir", str(traces / "tensorboard")]
        log = run(folder / script, launcher, [*flags, *args.extra])
        found = Figures.of(log, TOKENS, 1, warm_up=2)
        runs[row].append(found)
        results[row] = result(row, log, runs)
        # written after each run, so that a program that is stopped leaves what it has measured
        report.write(args.out, list(results.values()))
        yield name, log, line(results[row])
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
        "| run | tokens/s | relative to attention | relative to HGRN2 | peak GiB | loss, first -> last | banner |",
        "|---|---|---|---|---|---|---|",
    ]
    make_table(head, measure(script_in(args.megatron_lm).parent, args), args.logs)


if __name__ == "__main__":
    main()
