"""Tokens/s of Megatron-LM's pretraining on one GPU: attention, HGRN2 and a hybrid, by length and precision.

    python benchmarks/pretrain.py path/to/Megatron-LM [--rows ROW ...] [--profile] [--out FOLDER] [-- more flags]

Runs the unmodified pretrain_gpt.py on mock data once for each row and prints one table: 24 layers of 2048, 16 heads,
GLU 5632, vocabulary 32000, 32768 tokens an iteration, bf16 with Transformer Engine, distributed optimizer. Rows of one
length have the same flags but for what their names say; "beside attention" divides by the attention row of the same
length and precision in the same run. The median of the logged iterations after the first two counts. --profile adds
the kernels of one iteration by their time, into FOLDER.
"""

import argparse
import collections
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 32768
OVERTIME = "ended: it took too long"

COMMON = """
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632
    --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --untie-embeddings-and-output-weights
    --bf16 --transformer-impl transformer_engine --use-distributed-optimizer --no-gradient-accumulation-fusion
    --train-iters 12 --lr 3e-4 --lr-warmup-iters 2 --log-interval 1 --eval-iters 0 --eval-interval 100
    --no-create-attention-mask-in-dataloader
""".split()
BLOCK = """
    --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0
""".split()
ATTENTION, HGRN2 = "attention", "HGRN2"
# name -> (whether through the launcher, the flags that make the model)
MODELS = {
    ATTENTION: (False, [*BLOCK, "--position-embedding-type", "rope"]),
    HGRN2: (True, ["--spec", "hgrn2"]),
    "hybrid": (True, ["--spec", "hgrn2", "--hgrn2-layer-pattern", "HHH*"]),
    "HGRN2 by two words": (
        False,
        [*BLOCK, "--position-embedding-type", "none", "--spec", "hgrn2_megatron.spec", "hgrn2"],
    ),
}
SELECTIVE = "--recompute-granularity selective".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad".split()
# how a row is run -> (length, micro-batch, flags)
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
ROWS += [f"hybrid, {setting}" for setting in ("4096", "16384 selective", "32768 full")]
PROFILE = "--profile --use-pytorch-profiler --profile-step-start 10 --profile-step-end 11 --profile-ranks 0".split()


def command_of(name: str) -> tuple[bool, list[str]]:
    """Whether a row goes through the launcher, and its flags."""
    model, setting = name.split(", ")
    launcher, flags = MODELS[model]
    length, micro_batch, more = SETTINGS[setting]
    size = f"""
        --seq-length {length} --max-position-embeddings {length}
        --micro-batch-size {micro_batch} --global-batch-size {TOKENS // length}
    """.split()
    return launcher, [*COMMON, *size, *flags, *more]


def run(
    script: Path,
    launcher: bool,
    flags: list[str],
    processes: int = 1,
    module: str = "hgrn2_megatron",
    more_env: dict[str, str] | None = None,
    timeout: float | None = None,
) -> str:
    """Megatron's output for one row; `module` is the launcher, `timeout` the seconds after which the run is ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", module, str(script)] if launcher else [str(script)]
    path = [str(ROOT), str(ROOT / "kernels"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": ":".join(path), "CUDA_DEVICE_MAX_CONNECTIONS": "1"} | (more_env or {})
    # a checkout builds its dataset helpers with the python3 of PATH
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    process = subprocess.Popen(command + flags, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        # torchrun ends its processes when it is asked to end
        process.terminate()
        return f"{process.communicate()[0]}\n{OVERTIME}\n"


def numbers(name: str, log: str) -> list[float]:
    """What Megatron logged under a name, a regular expression."""
    return [float(x) for x in re.findall(rf"{name}: (\S+)", log)]


def tokens_per_second(log: str) -> float | None:
    """Of the median iteration after the first two, None where there are none."""
    times = numbers(r"elapsed time per iteration \(ms\)", log)[2:]
    return TOKENS / statistics.median(times) * 1000 if times else None


def row(name: str, log: str, tokens: float | None, beside: float | None) -> str:
    """One line of the table, or what went wrong; of this run and of attention's the tokens/s, where there are any."""
    losses = numbers("lm loss", log)
    if tokens is None:
        wrong = "out of memory" if "OutOfMemoryError" in log else "failed: see the log"
        return f"| {name} | {wrong} | | | | |"
    peak = max(numbers("max allocated", log), default=float("nan"))
    banner = next(iter(re.findall(r"^HGRN2: .*", log, re.M)), "")
    ratio = f"{tokens / beside:.2f}" if beside else ""
    return f"| {name} | {tokens:,.0f} | {ratio} | {peak / 1024:.1f} | {losses[0]:.3f} -> {losses[-1]:.3f} | {banner} |"


def kernel_table(folder: Path) -> str:
    """Kernels of a profiled iteration by their time, from the trace that torch's profiler left in a folder."""
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


def command_line(doc: str) -> argparse.ArgumentParser:
    """What every benchmark of Megatron's loop takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("megatron_lm", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the table and the full logs")
    parser.epilog = "What follows -- are further flags for Megatron."
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, of which `extra` is what follows --."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return parser.parse_args(words[:end], argparse.Namespace(extra=words[end + 1 :]))


def script_in(megatron_lm: Path) -> Path:
    """A checkout's pretrain_gpt.py."""
    script = megatron_lm.resolve() / "pretrain_gpt.py"
    if not script.is_file():
        raise SystemExit(f"{script} is not a file: give the folder of a Megatron-LM checkout")
    return script


def file_stem(name: str) -> str:
    """A row's name in the names of its files."""
    return name.replace(", ", "-").replace(" ", "-")


def make_table(head: list[str], runs: Iterable[tuple[str, str, str]], out: Path | None):
    """Print the lines of runs (name, log, line of the table) as they end, then the table; keep all of it in out."""
    table = list(head)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    for name, log, line in runs:
        if out:
            (out / f"{file_stem(name)}.log").write_text(log)
        table.append(line)
        print(line, flush=True)
    print("\n".join(table))
    if out:
        (out / "table.md").write_text("\n".join(table) + "\n")


def runs(script: Path, args: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    attention: dict[str, float | None] = {}
    for name in args.rows:
        launcher, flags = command_of(name)
        traces = args.out / "traces" / file_stem(name) if args.profile else None
        if traces:
            # Megatron writes the trace beside this folder
            flags += [*PROFILE, "--tensorboard-dir", str(traces / "tensorboard")]
        log = run(script, launcher, [*flags, *args.extra])
        tokens = tokens_per_second(log)
        model, setting = name.split(", ")
        if model == ATTENTION:
            attention[setting] = tokens
        yield name, log, row(name, log, tokens, attention.get(setting))
        # a run that failed may have left no trace
        if traces and tokens is not None:
            (args.out / f"{traces.name}.kernels.md").write_text(kernel_table(traces))


def main():
    parser = command_line(__doc__)
    parser.add_argument("--rows", nargs="+", default=ROWS, metavar="ROW", help=f"of these: {'; '.join(ROWS)}")
    parser.add_argument("--profile", action="store_true")
    args = parse(parser)
    if args.profile and not args.out:
        parser.error("--profile needs --out FOLDER")
    head = [
        "| run | tokens/s | beside attention | peak GiB | loss, first -> last | banner |",
        "|---|---|---|---|---|---|",
    ]
    make_table(head, runs(script_in(args.megatron_lm), args), args.out)


if __name__ == "__main__":
    main()
