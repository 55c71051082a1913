"""Train models in every layout that the GPUs of one host allow, with Megatron-LM's own loop on mock data.

    python benchmarks/scaling.py path/to/Megatron-LM [--layouts NAME ...] [--rows ROW ...] [--out FILE.json] [-- flags]
    python benchmarks/scaling.py path/to/Megatron-LM --sweep [--lengths 4096 32768 131072 1048576] [...]
    python benchmarks/scaling.py path/to/Megatron-LM --tiny [--side-by-side] [...]      up to 8 processes, no GPU

The first form trains HGRN2 and the hybrid HHH* for 20 iterations in every layout. The models have 24 layers of 2048
channels. On GPUs there are also models with 4096 channels ("HGRN2 4096"). The benchmark first writes a checkpoint of
fresh weights for each model, because Megatron draws the weights of each pipeline stage separately. This takes one
process, or as many as the model needs. Every layout then trains from that checkpoint on the same batches. A row with
FSDP cannot read the checkpoint, and draws the same weights itself.

The name of a row contains its layout. TP always comes with sequence parallelism. DP and CP come with the distributed
optimizer and both overlaps. Micro-batches grow with TP and CP, so that each process has as many tokens at a time as one
process alone. In a "weak" layout, each GPU has the whole batch of one GPU. "TP4 SP, graph" runs the iteration as one
CUDA graph, and "CP4, graphs of layers" captures each layer in a graph of its own.

The table has tokens/s per GPU (median of the iterations after the fourth), their share of the tokens/s of one GPU,
TFLOP/s as Megatron logs them, peak memory, and the first and the last loss. The two columns "apart" compare all
iterations with the run on one GPU, or with the first layout that fits if one GPU is too small. Both runs have the same
global batch. "Loss apart" is the largest difference of the loss, and "norm apart" is the largest relative difference of
the gradient's norm. The last column is the MiB that rank 0 sends in the second step, which counted.py counts. The row
of one GPU with another micro-batch shows how large these differences are from the rounding of bf16 alone.

The sweep trains on one sequence per step, with full recompute, at growing lengths and CP 1 to 8. HGRN2 and the hybrid
compute the loss in chunks. Attention does not, because Megatron cannot. The share compares a row with CP1 at the same
number of tokens per GPU, where the same local work runs without communication. (For attention layers the local work is
not the same.) If a length does not fit, longer ones are not tried.

--logs FOLDER keeps table.md, picture.png and the log of every run. --side-by-side runs several rows at a time if they
need few GPUs. These runs may slow each other down. Without a GPU the runs are in fp32 over gloo, and their times have
no meaning.
"""

import itertools
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pictures
import report
import torch
from devices import Devices, device_names
from figures import NOT_TRIED, TOO_LARGE, Figures, failure
from layouts import GPU_LAYOUTS, LAYOUTS, ONE, Layout, Row
from models import FULL, GPU, HGRN2, HYBRID, LOOP, NAMES, SIZE, WIDE
from runs import command_line, make_table, parse, run, script_in

MODEL = f"{SIZE} --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 4 --global-batch-size 32"
# every layout can divide these numbers: 8 heads, 8 layers, 16 chunks of a sequence
TINY = """--num-layers 8 --hidden-size 64 --hgrn2-expand-ratio 8 --num-attention-heads 8 --ffn-hidden-size 128
    --seq-length 64 --max-position-embeddings 64 --vocab-size 128 --micro-batch-size 2 --global-batch-size 16
    --lr 1e-3"""
# The vocabulary is padded to a multiple of 16 * TP, which gives the same size at TP1 and TP8.
TRAINING = f"{LOOP} --make-vocab-size-divisible-by 16 --lr 3e-5"
LENGTHS, TINY_LENGTHS = [4096, 32768, 131072, 1048576], [64, 128, 512]
SWEEP = [*FULL, "--micro-batch-size", "1", "--global-batch-size", "1", "--no-create-attention-mask-in-dataloader"]
# frees unused memory after the backward, before NCCL allocates its buffers
SWEEP += ["--empty-unused-memory-level", "1"]
CHUNKED_LOSS, WHOLE_LOSS = ["--hgrn2-loss-chunk-size", "8192"], ["--cross-entropy-loss-fusion"]


class Matrix:
    """The benchmark of every layout on the same batches.

    Args:
        common: flags of every row.
        folder: folder for the first weights of each model.
    """

    models = [HGRN2, HYBRID, *(WIDE if torch.cuda.is_available() else [])]
    iterations, warm_up = 20, 4
    layouts = GPU_LAYOUTS if torch.cuda.is_available() else LAYOUTS
    # column of the table -> format of its values
    columns = {
        "tokens/s per GPU": ",",
        "% of one GPU": ".1f",
        "TFLOP/s per GPU": ".1f",
        "peak GiB": ".1f",
        "loss, first -> last": "",
        "loss apart": ".1e",
        "norm apart": ".1e",
        "MiB sent per step": ",.2f",
    }

    def __init__(self, common: list[str], folder: Path):
        self.common, self.folder = ["--train-iters", str(self.iterations), *common], folder
        self.figures: dict[str, Figures] = {}
        self.results: list[dict] = []
        # (model, sequences of an iteration) -> figures of the first layout that fits, which is one process if that fits
        self.references: dict[tuple[str, int], Figures] = {}

    def prepare(self, rows: list[Row], devices: list[str], megatron: Callable[[list[str], list[str]], str]):
        """Write the first weights of each model. The learning rate is almost 0, so training does not change them."""
        for model in dict.fromkeys(row.model for row in rows):
            # a wide model does not fit on one GPU, and 8 GPUs are enough
            processes = min(2 ** int(math.log2(len(devices))), 8) if model in WIDE else 1
            row = Row(model, Layout.named(f"DP{processes}"))
            save = ["--save", str(self.folder / model), "--save-interval", "1", "--no-save-optim", "--no-save-rng"]
            flags = [*self.of_row(row), *save, "--exit-interval", "1", "--lr", "1e-30"]
            log = megatron(flags, devices[:processes])
            if not (self.folder / model / "latest_checkpointed_iteration.txt").is_file():
                raise SystemExit(f"the first weights of {model} could not be written:\n{log[-3000:]}")

    def size(self, row: Row) -> tuple[int, int]:
        """Return the length of a sequence, and the number of sequences of an iteration on one process."""
        return value("--seq-length", self.common), value("--global-batch-size", self.common)

    def of_row(self, row: Row) -> list[str]:
        """Return the flags of the model and the layout of a row."""
        flags = [*self.common, *row.model_flags]
        return [*flags, *row.layout.flags(self.size(row)[1], value("--micro-batch-size", flags))]

    def flags(self, row: Row) -> list[str]:
        """Return all flags of a row. Megatron-FSDP cannot read the first weights, and draws the same ones by itself."""
        if row.layout.fsdp:
            return self.of_row(row)
        return [*self.of_row(row), "--load", str(self.folder / row.model), "--finetune", "--no-load-optim"]

    def read(self, row: Row, log: str) -> str:
        """Keep the results of a row, and return its line of the table."""
        length, batch = self.size(row)
        found = Figures.of(log, length * row.layout.batch(batch), row.layout.processes, self.warm_up)
        if found is None:
            result = {"note": failure(log)}
            cells = [failure(log), *[""] * (len(self.columns) - 1)]
        else:
            self.figures[row.name] = found
            result = self.result(row, found)
            # a column without a value has an empty cell
            shown = {column: result.get(column) for column in self.columns}
            cells = ["" if x is None else format(x, self.columns[column]) for column, x in shown.items()]
        self.results.append({"run": row.name, **result})
        return f"| {' | '.join([row.name, *cells])} |"

    def result(self, row: Row, found: Figures) -> dict:
        """Return the columns of a row, with the losses and norms for the file of results."""
        one = self.figures.get(f"{row.model}, {ONE}")
        reference = self.references.setdefault((row.model, row.layout.batch(self.size(row)[1])), found)
        result = {
            "tokens/s per GPU": round(found.rate),
            "% of one GPU": round(100 * found.rate / one.rate, 1) if one else None,
            "TFLOP/s per GPU": found.tflops,
            "peak GiB": round(found.peak, 1) or None,
            "loss, first -> last": f"{found.losses[0]:.4f} -> {found.losses[-1]:.4f}",
            "MiB sent per step": round(found.sent, 2),
            "losses": found.losses,
            "norms": found.norms,
        }
        if reference is not found:
            losses = zip(found.losses, reference.losses, strict=True)
            norms = zip(found.norms, reference.norms, strict=True)
            result["loss apart"] = max(abs(x - y) for x, y in losses)
            result["norm apart"] = max(abs(x / y - 1) for x, y in norms)
        return result


class Sweep(Matrix):
    """The benchmark of one sequence per step, at growing lengths."""

    models, iterations, warm_up = NAMES, 6, 2
    layouts = ["CP1", "CP2", "CP4", "CP8"]
    columns = {
        "ms per step": ",.1f",
        "tokens/s per GPU": ",",
        "% of CP1": ".1f",
        "TFLOP/s per GPU": ".1f",
        "peak GiB": ".1f",
        "MiB sent per step": ",.2f",
    }

    def prepare(self, rows: list[Row], devices: list[str], megatron: Callable[[list[str], list[str]], str]):
        """Do nothing: each row draws its own weights, because no losses are compared."""

    def size(self, row: Row) -> tuple[int, int]:
        return row.length, 1

    def flags(self, row: Row) -> list[str]:
        size = ["--seq-length", str(row.length), "--max-position-embeddings", str(row.length)]
        loss = CHUNKED_LOSS if "--spec" in row.model_flags else WHOLE_LOSS
        return [*self.common, *row.model_flags, *SWEEP, *size, *loss, *row.layout.flags(1, 1)]

    def result(self, row: Row, found: Figures) -> dict:
        alone = self.figures.get(f"{row.model}, CP1, {row.length // row.layout.cp}")
        return {
            "ms per step": round(found.milliseconds, 1),
            "tokens/s per GPU": round(found.rate),
            "% of CP1": round(100 * found.rate / alone.rate, 1) if alone else None,
            "TFLOP/s per GPU": found.tflops,
            "peak GiB": round(found.peak, 1) or None,
            "MiB sent per step": round(found.sent, 2),
        }


def value(flag: str, flags: list[str]) -> int:
    """Return the number that follows a flag. If a flag is given several times, the last one counts, as in Megatron."""
    place = len(flags) - 1 - flags[::-1].index(flag)
    return int(flags[place + 1])


def run_all(rows: list[Row], start: Callable[[Row, list[str]], str], devices: Devices, workers: int) -> Iterator[str]:
    """Run as many rows at a time as workers and devices allow, and yield their logs in the order of the rows."""
    before: dict[tuple[str, Layout], Future] = {}

    def run_row(row: Row, shorter: Future | None) -> str:
        if shorter and failure(shorter.result()) in TOO_LARGE:
            return NOT_TRIED
        with devices.lent(row.layout.processes) as taken:
            return start(row, taken)

    with ThreadPoolExecutor(workers) as pool:
        futures = []
        for row in rows:
            chain = row.model, row.layout
            before[chain] = pool.submit(run_row, row, before.get(chain))
            futures.append(before[chain])
        yield from (future.result() for future in futures)


def choose(rows: list[Row], processes: int) -> list[Row]:
    """Return the rows that this machine can run, sorted by length and processes. Print why a row is left out.

    The run of each model on one process is added, because other rows are compared with it.
    """
    ones = [Row(row.model, Layout.named(ONE)) for row in rows if not row.length]
    chosen = []
    # Longer rows come after the shorter ones, with which they are compared. Rows of few processes run side by side.
    for row in sorted(dict.fromkeys(ones + rows), key=lambda row: (row.length or 0, row.layout.processes)):
        reason = "" if torch.cuda.is_available() else row.impossible_without_gpu()
        if row.layout.processes > processes:
            reason = f"it needs {row.layout.processes} processes, and there are {processes}"
        if reason:
            print(f"left out: {row.name}: {reason}", flush=True)
        else:
            chosen.append(row)
    return chosen


def main():
    parser = command_line(__doc__)
    parser.add_argument(
        "--layouts", nargs="+", metavar="NAME", help=f"layouts to run; default: {'; '.join(Matrix.layouts)}"
    )
    parser.add_argument(
        "--models",
        nargs="+",
        choices=NAMES + WIDE,
        metavar="MODEL",
        help=f"models to run; default: {'; '.join(Matrix.models)}; in the sweep {'; '.join(NAMES)}",
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="single rows: 'HGRN2, TP2 SP', or in the sweep 'HGRN2, CP2, 4096'"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="measure time and memory against the length of the sequence"
    )
    parser.add_argument("--lengths", nargs="+", type=int, help=f"lengths of the sweep in tokens; default: {LENGTHS}")
    parser.add_argument("--model", help="Megatron's flags of the model and the batch, quoted as one argument")
    parser.add_argument("--tiny", action="store_true", help="train a small model, on up to 8 processes without a GPU")
    parser.add_argument("--side-by-side", action="store_true", help="run as many rows at a time as the devices allow")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a run is stopped")
    args = parse(parser)
    script = script_in(args.megatron_lm)
    gpus = torch.cuda.device_count()
    if args.lengths and not args.sweep:
        parser.error("--lengths has an effect only with --sweep: add --sweep")
    if not (gpus or args.tiny or args.model):
        parser.error("this machine has no GPU: add --tiny, or give a small model with --model")
    model = args.model or (TINY if args.tiny else MODEL)
    common = shlex.split(f"{TRAINING} {model} {GPU if gpus else ''}") + args.extra
    names = device_names()
    form = Sweep if args.sweep else Matrix
    lengths = args.lengths or (TINY_LENGTHS if args.tiny else LENGTHS)
    layouts = [Layout.named(name) for name in args.layouts or form.layouts]
    rows = [
        Row(*row) for row in itertools.product(args.models or form.models, layouts, lengths if args.sweep else [None])
    ]
    rows = choose([Row.named(name, args.sweep) for name in args.rows or []] or rows, len(names))

    with tempfile.TemporaryDirectory() as folder:
        kind = form(common, Path(folder))

        def megatron(flags: list[str], devices: list[str]) -> str:
            env = {"CUDA_VISIBLE_DEVICES": ",".join(devices)} if gpus else {"OMP_NUM_THREADS": "1"}
            if args.sweep:
                env["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
            more = dict(module="benchmarks.counted", more_env=env, timeout=args.timeout)
            return run(script, True, flags, len(devices), **more)

        def runs() -> Iterator[tuple[str, str, str]]:
            kind.prepare(rows, names, megatron)
            workers = len(names) if args.side_by_side else 1
            logs = run_all(rows, lambda row, devices: megatron(kind.flags(row), devices), Devices(names), workers)
            for row, log in zip(rows, logs, strict=True):
                yield row.name, log, kind.read(row, log)

        names_of_columns = ["run", *kind.columns]
        head = [f"| {' | '.join(names_of_columns)} |", "|---" * len(names_of_columns) + "|"]
        about = ", ".join([report.machine(), *(f"{name} {number}" for name, number in report.versions().items())])
        try:
            make_table([about, "", *head], runs(), args.logs)
        finally:
            report.write(args.out, kind.results)
    if args.logs and kind.figures:
        pictures.save(pictures.lines if args.sweep else pictures.bars, kind.figures, rows, args.logs / "picture.png")


if __name__ == "__main__":
    main()
