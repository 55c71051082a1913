"""Write the generated tables of README.md and docs/ from the results in benchmarks/results/.

    python scripts/tables.py            write every table
    python scripts/tables.py --check    change nothing; name the tables that differ, and exit with 1 if there are any

A generated table stands between `<!-- table: NAME -->` and `<!-- end -->`. TABLES and `readme_performance` below say
what each name shows. Numbers are copied from the results and rounded; only README's ratios are computed here.
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = "<!-- table: "
TABLE = re.compile(rf"{MARK}(\S+) -->\n((?:(?!{MARK}).)*?)<!-- end -->", re.S)

# name of a table -> file of results, and the columns that the table shows of each row (None: all of them)
LAYOUT = ["run", "tokens/s per GPU", "% of one GPU", "TFLOP/s per GPU", "peak GiB", "loss apart", "norm apart"]
SWEEP = ["run", "ms per step", "tokens/s per GPU", "% of CP1", "TFLOP/s per GPU", "peak GiB", "MiB sent per step"]
EXCHANGE = ["tokens", "way", "ms", "% slower than alone", "tokens/s per GPU", "MiB sent per layer", "peak GiB"]
OPERATOR = ["shape", "operator", "forward ms", "forward + backward ms", "in a row ms", "in a graph ms", "kept MiB"]
KEPT = "HGRN2, states kept, kernels for Hopper"
TIMES = ["forward", "both", "both eager", "recomputed"]
WAYS = ["forward", "alone", "in a row", "in a graph"]
MQAR = ["width", "mixer", "state", "learned", "learning rate", *(f"{pairs} pairs" for pairs in (4, 8, 16, 32, 64))]
FLA_MODEL = ["run", "model", "ms", "kernels ms", "products ms", "tokens/s", "times as fast", "peak GiB"]
ALL_HELD_OUT = ["all held-out, 2,048 tokens", "all held-out, 32,768 tokens"]
SEVERAL_SEEDS = ["mixer", "parameters", "seeds", "tokens/s"] + [
    f"{what}, {n} tokens" for n in ("2,048", "32,768") for what in ("all held-out", "between seeds")
]
TABLES = {
    "throughput": ("2026-11-27-throughput", ["run", "tokens/s", "relative to attention", "peak GiB"]),
    "throughput-32768": (
        "2026-11-27-throughput-32768",
        ["run", "tokens/s", "relative to attention", "relative to bf16", "peak GiB", "note"],
    ),
    "throughput-replaced": (
        "2026-11-25-throughput",
        ["run", "tokens/s", "relative to attention", "peak GiB", "loss, first -> last"],
    ),
    "operator": ("2026-11-24-operator", [*OPERATOR, "peak MiB"]),
    "gates": (
        "2026-11-25-gates",
        ["gates", "2, 3, 4 bands, exact", "forward ms", "forward + backward ms", "relative to ordinary"]
        + ["recomputed, relative to ordinary"],
    ),
    "layouts": ("2026-11-27-layouts", [*LAYOUT, "MiB sent per step"]),
    "layouts-4096": ("2026-11-27-layouts-4096", [*LAYOUT, "MiB sent per step"]),
    "layouts-four-gpus": ("2026-11-27-layouts-four-gpus", LAYOUT),
    "layouts-no-graph": ("2026-11-27-layouts-no-graph", [*LAYOUT, "MiB sent per step"]),
    "fsdp": ("2026-11-28-fsdp", [*LAYOUT, "MiB sent per step"]),
    "offloading": ("2026-11-28-offloading", ["run", "tokens/s", "peak GiB", "loss, first -> last"]),
    "layouts-cpu": ("2026-11-27-layouts-cpu", ["run", "loss apart", "norm apart", "MiB sent per step"]),
    "layouts-cpu-weak": ("2026-11-27-layouts-cpu-weak", ["run", "loss apart", "norm apart", "MiB sent per step"]),
    "rounding": (
        "2026-11-25-layouts",
        ["layout", "tokens/s per GPU", "peak GiB", "loss, first -> last", "loss apart", "norm apart", "host"],
    ),
    "context-parallel": ("2026-11-24-context-parallel", EXCHANGE),
    "context-parallel-262144": ("2026-11-27-context-parallel", EXCHANGE),
    "length-sweep": ("2026-11-27-length-sweep", SWEEP),
    "length-sweep-two-gpus": ("2026-11-27-length-sweep-two-gpus", SWEEP),
    "longest-sequence": (
        "2026-11-27-longest-sequence",
        ["tokens", "model", "GPUs", "seconds per step", "tokens/s per GPU", "allocated GiB", "reserved GiB", "note"],
    ),
    "decoding": (
        "2026-11-27-decoding",
        ["model", "context", "batch", "ms per step", "tokens/s", "ms per step in a graph", "tokens/s in a graph"]
        + ["states or cache MiB", "peak GiB", "note"],
    ),
    "real-text": ("2026-11-27-real-text", ["model", "bits per byte on held-out files"]),
    "conversion": ("2026-11-27-conversion", ["model", "fp32", "bf16"]),
    "evaluation": (
        "2026-11-25-evaluation",
        ["command", "heldout_continuation, accuracy", "heldout_bits, bits per byte", "took"],
    ),
    "mqar": ("2026-11-28-mqar-6000-steps", MQAR),
    "mqar-512": ("2026-11-29-mqar-512", MQAR),
    "kernels-rewritten": (
        "2026-11-28-kernels-rewritten",
        ["case", "bits", "forward before, us", "forward after, us", "both before, us", "both after, us"]
        + ["after / before"],
    ),
    "decoding-engine": ("2026-11-27-decoding-engine", ["way", "context", "ms per step", "tokens/s"]),
    "hybrid-model": (
        "2026-11-28-hybrid-model",
        ["run", "tokens/s", "tokens/s, lowest and highest", "relative to attention", "relative to HGRN2", "peak GiB"]
        + ["loss, first -> last", "loss of the head, first -> last"],
    ),
    "hybrid-model-chunks": (
        "2026-11-28-hybrid-model-chunks",
        ["run", "tokens/s", "peak GiB", "loss, first -> last", "loss of the head, first -> last"],
    ),
    "hopper-dispatch": (
        "2026-11-28-hopper-dispatch",
        ["shape", "gates", "2, 3, 4 bands, exact", *OPERATOR[1:-1]],
    ),
    "hopper-dispatch-product": (
        "2026-11-28-hopper-dispatch-product",
        ["case", *(f"{time}, {kernels}" for time in TIMES for kernels in ("Hopper", "in use"))],
    ),
    "hopper-h200": (
        "2026-11-28-hopper-h200",
        ["shape", "gates", *OPERATOR[1:-1]],
    ),
    "hopper-h200-product": (
        "2026-11-28-hopper-h200-product",
        ["case", "predicted, us", *(f"{time}, {kernels}" for time in TIMES for kernels in ("Hopper", "in use"))],
    ),
    "hopper-in-use": ("2026-11-29-hopper", ["shape", "gates", *OPERATOR[1:-1]]),
    "hopper-in-use-product": (
        "2026-11-29-hopper-product",
        ["case", "predicted, us", *(f"{time}, {kernels}" for time in TIMES for kernels in ("Hopper", "any GPU"))],
    ),
    "hopper-in-use-training": (
        "2026-11-29-hopper-training",
        ["run", "tokens/s", "relative to attention", "relative to bf16", "peak GiB"],
    ),
    "training-hopper": (
        "2026-11-29-throughput",
        ["run", "tokens/s", "relative to attention", "relative to bf16", "peak GiB"],
    ),
    "hopper-host": (
        "2026-11-29-hopper-host",
        ["shape", "gates", "operator"] + [f"{way}, {when}" for way in WAYS for when in ("before", "after")],
    ),
    "hopper-triton": (
        "2026-11-29-hopper-triton",
        ["shape", "gates", "operator"] + [f"{way}, {release}" for way in WAYS for release in (3.6, 3.9)],
    ),
    "fla-model": ("2026-11-29-fla-model", FLA_MODEL),
    "fla-model-own": ("2026-11-29-fla-model-own", FLA_MODEL),
    "fp8-profile": ("2026-11-29-fp8-profile", ["kernels", "bf16 ms", "FP8 ms"]),
    "fp8-graph": (
        "2026-11-29-fp8-graph",
        ["run", "tokens/s", "relative to bf16", "peak GiB", "loss, first -> last"],
    ),
    "language-model": (
        "2026-11-28-language-model",
        ["tokens", "seconds", "tokens/s since the row above", "held-out bits per byte"],
    ),
    "language-model-positions": (
        "2026-11-28-language-model-positions",
        ["tokens before", "sequences of 2,048", "sequences of 32,768"],
    ),
    "mixers": (
        "2026-11-29-language-model",
        ["mixer", "parameters", "tokens", "seconds", "tokens/s", "held-out bits per byte", *ALL_HELD_OUT],
    ),
    "trained-gates": (
        "2026-11-29-hgrn2-gates",
        ["layer", "mean forget gate", "largest decay of a chunk, powers of two", "within the limit"]
        + ["2 bands", "3 bands", "4 bands", "exact form"],
    ),
    "state-tracking": (
        "2026-11-29-state-tracking",
        ["machine", "a guess", "mixer", "learning rate"]
        + [
            f"tokens {part}" for part in ("1 to 16", "17 to 64", "65 to 128", "129 to 256", "257 to 512", "513 to 1024")
        ],
    ),
    "needle": (
        "2026-11-29-needle",
        ["mixer", "learned", "learning rate", "bytes"] + [f"depth {part}%" for part in (0, 25, 50, 75, 100)] + ["mean"],
    ),
    "six-mixers": (
        "2026-11-29-six-mixers",
        ["mixer", "parameters", "learning rate", "seconds", "tokens/s", "held-out bits per byte", *ALL_HELD_OUT],
    ),
    "ablations": ("2026-11-30-ablations", SEVERAL_SEEDS),
    "ablations-positions": (
        "2026-11-30-ablations#positions",
        ["tokens before", "HGRN2, 2 seeds"]
        + [f"HGRN2 hybrid{kind}, 2 seeds" for kind in (" 1:1", "", " 5:1", " without positions")],
    ),
    "ratios": ("2026-11-30-ratios", SEVERAL_SEEDS),
    "ratios-positions": ("2026-11-30-ratios#positions", None),
    "ratios-long-documents": ("2026-11-30-ratios#long documents", None),
    "beside-fla": (
        "2026-11-29-beside-fla",
        ["run", "parameters", "tokens/s", "mean loss at the end", "mean distance", "held-out bits per byte"],
    ),
    "beside-fla-tenths": ("2026-11-29-beside-fla#tenths", None),
    "six-mixers-seeds": ("2026-11-29-six-mixers#seeds", None),
    "six-mixers-positions": ("2026-11-29-six-mixers#positions", None),
    "six-mixers-sweep": (
        "2026-11-29-six-mixers#sweep rows",
        ["mixer", "learning rate", "seconds", "tokens/s", "held-out bits per byte"],
    ),
    "mixers-positions": (
        "2026-11-29-language-model-positions",
        ["tokens before"] + [f"{mixer}, {n}" for n in ("2,048", "32,768") for mixer in ("attention", "HGRN2", "HHH*")],
    ),
}
# columns that do not show their numbers as they stand, with commas between thousands
FORMATS = {name: ".1e" for name in ("loss apart", "norm apart")}
FORMATS |= {name: ".4f" for name in ("mean loss at the end", "mean distance")}
FORMATS |= {
    name: ".2f"
    for name in (
        "relative to attention",
        "relative to bf16",
        "relative to ordinary",
        "recomputed, relative to ordinary",
    )
}
FORMATS |= {name: ".3f" for name in ["relative to HGRN2", *OPERATOR] if name.endswith((" ms", " HGRN2"))}


def results_of(name: str) -> dict:
    """Return what benchmarks/results/NAME.json holds."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def rows_of(name: str) -> list[dict]:
    """Return the rows of benchmarks/results/NAME.json, or for NAME#KEY the rows that stand under KEY."""
    file, _, key = name.partition("#")
    return results_of(file)[key or "rows"]


def gpu_of(name: str) -> str:
    """Return the kind of GPU of benchmarks/results/NAME.json, such as H100."""
    return re.search(r"[HA]\d+", results_of(name)["machine"])[0]


def cell(column: str, value: str | float | None) -> str:
    """Return a value as a table shows it. None is an empty cell."""
    if value is None or isinstance(value, str):
        return value or ""
    # an exact 0 stays 0
    return format(value, FORMATS.get(column, ",") if value else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def of_columns(file: str, columns: list[str] | None) -> str:
    """Return a table of every row of a file of results, by default with the columns of its first row.

    Raises:
        ValueError: no row has one of the columns.
    """
    rows = rows_of(file)
    columns = columns or list(rows[0])
    if missing := [column for column in columns if not any(column in row for row in rows)]:
        raise ValueError(f"benchmarks/results/{file}.json has no {', '.join(missing)}: correct TABLES in {__file__}")
    return markdown(columns, [[cell(column, row.get(column)) for column in columns] for row in rows])


def readme_performance() -> str:
    """Return README's one table: training and the operator compared with attention, and fla's model with its own."""
    long, plain, new = "2026-11-27-throughput-32768", "2026-11-27-throughput", "2026-11-29-throughput"
    training = {(file, row["run"]): row.get("tokens/s") for file in (long, plain, new) for row in rows_of(file)}
    rows = []
    for setting, words, file in (
        ("4096", "training, sequences of 4096", new),
        ("16384 selective", "training, 16384, selective recompute", new),
        ("16384", "training, 16384, no recompute", plain),
        ("32768 full", "training, 32768, full recompute", long),
    ):
        own, other = (training[file, f"{model}, {setting}"] for model in ("HGRN2", "attention"))
        rows.append([words, gpu_of(file), f"{own:,} tokens/s", f"attention: {other:,}", f"{own / other:.2f}", file])
    now, model = "2026-11-29-hopper", "2026-11-29-fla-model"
    kernels = {(row["shape"], row["gates"], row["operator"]): row["forward + backward ms"] for row in rows_of(now)}
    for shape, gates, words in (
        ("8x4096x16", "fresh model", "operator, 8 sequences of 4096, a fresh model's gates"),
        ("8x4096x16", "trained model", "operator, 8 sequences of 4096, a trained model's gates"),
        ("1x32768x16", "ordinary", "operator, 1 sequence of 32768, random gates"),
    ):
        own, other = kernels[shape, gates, KEPT], kernels[shape, "ordinary", "attention"]
        rows.append([words, gpu_of(now), f"{own:.2f} ms", f"cuDNN attention: {other:.2f}", f"{other / own:.1f}", now])
    step = {row["model"]: row["tokens/s"] for row in rows_of(model) if row["run"] == "training step, 4 x 4096"}
    # fla was measured twice
    own, other = step["with the operator"], max(step["fla"], step["fla, restored"])
    words = "training in fla's model, 4096"
    rows.append([words, gpu_of(model), f"{own:,} tokens/s", f"fla: {other:,}", f"{own / other:.2f}", model])
    for row in rows:
        row[-1] = f"[{row[-1][:10]}](docs/evidence/{row[-1].removesuffix('-32768')}.md)"
    return markdown(["one GPU, bf16", "GPU", "HGRN2", "compared with", "times as fast", "measured"], rows)


def table(name: str) -> str:
    """Return a table by its name. An unknown name raises a ValueError."""
    if name == "readme-performance":
        return readme_performance()
    if name not in TABLES:
        raise ValueError(f"no table is named {name!r}: use one of readme-performance, {', '.join(TABLES)}")
    return of_columns(*TABLES[name])


def rewritten(text: str) -> tuple[str, list[str]]:
    """Return a page with its tables written anew, and the names of those that were different.

    Raises:
        ValueError: a table is unknown, or has no end mark.
    """
    if text.count(MARK) != len(TABLE.findall(text)):
        raise ValueError(
            "a table has no <!-- end --> before the next table, or the mark is misspelled: add the end mark"
        )
    different = [name for name, body in TABLE.findall(text) if body != table(name)]
    return TABLE.sub(lambda found: f"{MARK}{found[1]} -->\n{table(found[1])}<!-- end -->", text), different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table differs")
    check = parser.parse_args().check
    status = 0
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        where = page.relative_to(ROOT)
        try:
            text, different = rewritten(page.read_text())
        except ValueError as error:
            print(f"{where}: {error}")
            status = 1
            continue
        if different and check:
            print(f"{where}: {', '.join(different)}: differs from its results; run python scripts/tables.py")
            status = 1
        elif different:
            page.write_text(text)
            print(f"{where}: {', '.join(different)}: written")
    return status


if __name__ == "__main__":
    sys.exit(main())
