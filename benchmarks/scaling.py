"""Models in every layout that the GPUs of one host allow, through Megatron-LM's own loop on mock data.

    python benchmarks/scaling.py path/to/Megatron-LM [--out FOLDER] [--layouts NAME ...] [--rows ROW ...] [-- flags]
    python benchmarks/scaling.py path/to/Megatron-LM --sweep [--lengths 4096 32768 131072 1048576] [--out FOLDER] [...]
    python benchmarks/scaling.py path/to/Megatron-LM --tiny [--side-by-side] [...]      up to 8 processes, no GPU

The first trains HGRN2 and the hybrid HHH*, 24 layers of 2048, and on GPUs of 4096 too ("HGRN2 4096"), for 20 iterations
in every layout. One process of each model, or as many as it takes, first writes a checkpoint of fresh weights, because
Megatron draws each pipeline stage's on its own; every layout then trains from it on the same batches. A name says the
layout: TP always with sequence parallelism, DP and CP with the distributed optimizer and both overlaps. Under TP and CP
micro-batches are larger, so that a process has as many tokens at a time as one alone. "Weak" layouts have the batch
once for each GPU. The table gives tokens/s a GPU (median of the iterations after the fourth) also as a share of one
GPU's, TFLOP/s as Megatron logs them, peak memory, the first and the last loss, the largest difference of a loss to that
of one GPU, or of the first layout on as large a batch that fits, the largest of the gradient's norm as a share, and
what rank 0 sends in the second step, counted where it is sent (counted.py). One GPU with another micro-batch says how
much of the differences is the rounding of bf16. "TP4 SP, graph" is the iteration as one CUDA graph, "CP4, graphs of
layers" a graph of each layer.

The sweep trains on one sequence a step, of growing length, with full recompute at CP 1 to 8: HGRN2 and the hybrid with
the loss by chunks, attention without, for Megatron has none. Its shares are of CP1 at as many tokens a GPU: what the
same local work takes alone (of attention's layers it is not the same). After a length that does not fit, no longer one
is tried.

--out keeps table.md, picture.png and the log of every run. --side-by-side fills the host with runs that need few GPUs;
they may disturb each other's times. Without a GPU the runs are in fp32 over gloo, and their times mean nothing.
"""

import itertools
import math
import shlex
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from devices import Devices, device_names, machine
from figures import NOT_TRIED, TOO_LARGE, Figures, failure
from layouts import GPU_LAYOUTS, LAYOUTS, ONE, Layout, Row
from models import FULL, GPU, HGRN2, HYBRID, LOOP, NAMES, SIZE, WIDE
from runs import command_line, make_table, parse, run, script_in

MODEL = f"{SIZE} --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 4 --global-batch-size 32"
# what every layout divides: 8 heads, 8 layers, 16 pieces of a sequence
TINY = """--num-layers 8 --hidden-size 64 --hgrn2-expand-ratio 8 --num-attention-heads 8 --ffn-hidden-size 128
    --seq-length 64 --max-position-embeddings 64 --vocab-size 128 --micro-batch-size 2 --global-batch-size 16
    --lr 1e-3"""
# the vocabulary is padded to 16 a TP rank: to the same at TP1 and TP8
TRAINING = f"{LOOP} --make-vocab-size-divisible-by 16 --lr 3e-5"
LENGTHS, TINY_LENGTHS = [4096, 32768, 131072, 1048576], [64, 128, 512]
SWEEP = [*FULL, "--micro-batch-size", "1", "--global-batch-size", "1", "--no-create-attention-mask-in-dataloader"]
# what the backward leaves goes back before NCCL asks for buffers of its own
SWEEP += ["--empty-unused-memory-level", "1"]
CHUNKED_LOSS, WHOLE_LOSS = ["--hgrn2-loss-chunk-size", "8192"], ["--cross-entropy-loss-fusion"]


class Matrix:
    """Every layout on the same batches.

    Args:
        common: flags of every row.
        folder: for the first weights of each model.
    """

    models = [HGRN2, HYBRID, *(WIDE if torch.cuda.is_available() else [])]
    iterations, warm_up = 20, 4
    layouts = GPU_LAYOUTS if torch.cuda.is_available() else LAYOUTS
    head = [
        "| run | tokens/s a GPU | of one GPU's | TFLOP/s a GPU | peak GiB | loss, first -> last | loss apart | "
        "norm apart | MiB sent a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def __init__(self, common: list[str], folder: Path):
        self.common, self.folder = ["--train-iters", str(self.iterations), *common], folder
        self.figures: dict[str, Figures] = {}
        # of each model and sequences of an iteration, the first layout that fits: one process, where it does
        self.references: dict[tuple[str, int], Figures] = {}

    def prepare(self, rows: list[Row], devices: list[str], megatron: Callable[[list[str], list[str]], str]):
        """Write the first weights; a learning rate of nearly 0 leaves them as drawn."""
        for model in dict.fromkeys(row.model for row in rows):
            # a wide one does not fit on one GPU, and 8 GPUs are enough
            processes = min(2 ** int(math.log2(len(devices))), 8) if model in WIDE else 1
            row = Row(model, Layout.named(f"DP{processes}"))
            save = ["--save", str(self.folder / model), "--save-interval", "1", "--no-save-optim", "--no-save-rng"]
            flags = [*self.of_row(row), *save, "--exit-interval", "1", "--lr", "1e-30"]
            log = megatron(flags, devices[:processes])
            if not (self.folder / model / "latest_checkpointed_iteration.txt").is_file():
                raise SystemExit(f"the first weights of {model} could not be written:\n{log[-3000:]}")

    def size(self, row: Row) -> tuple[int, int]:
        """Length of a sequence, and how many an iteration has in one process."""
        return value("--seq-length", self.common), value("--global-batch-size", self.common)

    def of_row(self, row: Row) -> list[str]:
        """Flags of a row's model and layout."""
        flags = [*self.common, *row.model_flags]
        return [*flags, *row.layout.flags(self.size(row)[1], value("--micro-batch-size", flags))]

    def flags(self, row: Row) -> list[str]:
        return [*self.of_row(row), "--load", str(self.folder / row.model), "--finetune", "--no-load-optim"]

    def read(self, row: Row, log: str) -> str:
        """A row's line of the table; keeps its figures."""
        length, batch = self.size(row)
        found = Figures.of(log, length * row.layout.batch(batch), row.layout.processes, self.warm_up)
        if found is None:
            cells = [failure(log)]
        else:
            self.figures[row.name] = found
            cells = [*self.cells(row, found), f"{found.sent:,.2f}"]
        cells += [""] * (self.head[1].count("---") - 1 - len(cells))
        return f"| {' | '.join([row.name, *cells])} |"

    def cells(self, row: Row, found: Figures) -> list[str]:
        """What stands in a row between its name and what it sends."""
        one = self.figures.get(f"{row.model}, {ONE}")
        reference = self.references.setdefault((row.model, row.layout.batch(self.size(row)[1])), found)
        loss_apart = norm_apart = ""
        if reference is not found:
            loss_apart = f"{max(abs(x - y) for x, y in zip(found.losses, reference.losses, strict=True)):.1e}"
            norm_apart = f"{max(abs(x / y - 1) for x, y in zip(found.norms, reference.norms, strict=True)):.1e}"
        return [
            f"{found.rate:,.0f}",
            f"{found.rate / one.rate:.1%}" if one else "",
            f"{found.tflops:.1f}",
            f"{found.peak:.1f}" if found.peak else "",
            f"{found.losses[0]:.4f} -> {found.losses[-1]:.4f}",
            loss_apart,
            norm_apart,
        ]

    def draw(self, rows: list[Row], plt):
        """Bars of each layout, a colour a model."""
        done = [row for row in rows if row.name in self.figures]
        layouts = list(dict.fromkeys(row.layout.name for row in done))
        models = list(dict.fromkeys(row.model for row in done))
        figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.35 * len(layouts)), sharey=True)
        for i, model in enumerate(models):
            of_model = [row for row in done if row.model == model]
            found = [self.figures[row.name] for row in of_model]
            height = 0.8 / len(models)
            places = [layouts.index(row.layout.name) + (i - (len(models) - 1) / 2) * height for row in of_model]
            axes[0].barh(places, [x.rate for x in found], height, label=model)
            axes[1].barh(places, [x.sent for x in found], height)
        axes[0].set_yticks(range(len(layouts)), layouts)
        axes[0].invert_yaxis()
        axes[0].set_xlabel("tokens/s a GPU")
        axes[1].set_xlabel("MiB that rank 0 sends in a step")
        axes[0].legend()
        return figure


class Sweep(Matrix):
    """One sequence a step, of growing length."""

    models, iterations, warm_up = NAMES, 6, 2
    layouts = ["CP1", "CP2", "CP4", "CP8"]
    head = [
        "| run | ms a step | tokens/s a GPU | of CP1 at as many tokens a GPU | TFLOP/s a GPU | peak GiB | "
        "MiB sent a step |",
        "|---|---|---|---|---|---|---|",
    ]

    def prepare(self, rows: list[Row], devices: list[str], megatron: Callable[[list[str], list[str]], str]):
        """Nothing: each row draws its weights, no losses are compared."""

    def size(self, row: Row) -> tuple[int, int]:
        return row.length, 1

    def flags(self, row: Row) -> list[str]:
        size = ["--seq-length", str(row.length), "--max-position-embeddings", str(row.length)]
        loss = CHUNKED_LOSS if "--spec" in row.model_flags else WHOLE_LOSS
        return [*self.common, *row.model_flags, *SWEEP, *size, *loss, *row.layout.flags(1, 1)]

    def cells(self, row: Row, found: Figures) -> list[str]:
        alone = self.figures.get(f"{row.model}, CP1, {row.length // row.layout.cp}")
        return [
            f"{found.milliseconds:,.1f}",
            f"{found.rate:,.0f}",
            f"{found.rate / alone.rate:.1%}" if alone else "",
            f"{found.tflops:.1f}",
            f"{found.peak:.1f}" if found.peak else "",
        ]

    def draw(self, rows: list[Row], plt):
        """Lines against length, a colour a model, a marker a CP."""
        done = [row for row in rows if row.name in self.figures]
        figure, axes = plt.subplots(1, 2, figsize=(12, 5))
        models, layouts = (list(dict.fromkeys(x)) for x in zip(*((r.model, r.layout.name) for r in done), strict=True))
        lengths = sorted({row.length for row in done})
        for model, layout in dict.fromkeys((row.model, row.layout.name) for row in done):
            found = {r.length: self.figures[r.name] for r in done if (r.model, r.layout.name) == (model, layout)}
            look = dict(color=f"C{models.index(model)}", marker="osD^v<>"[layouts.index(layout) % 7])
            axes[0].plot(list(found), [x.rate for x in found.values()], **look)
            axes[1].plot(list(found), [x.peak for x in found.values()], label=f"{model}, {layout}", **look)
        for axis, label in zip(axes, ("tokens/s a GPU", "peak GiB a GPU"), strict=True):
            axis.set(xscale="log", xlabel="tokens of the sequence", ylabel=label, ylim=(0, None))
            axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
            axis.minorticks_off()
        axes[1].legend(loc="upper left", bbox_to_anchor=(1, 1))
        return figure


def value(flag: str, flags: list[str]) -> int:
    """The number that Megatron takes where a flag is given, the last one."""
    place = len(flags) - 1 - flags[::-1].index(flag)
    return int(flags[place + 1])


def run_all(rows: list[Row], start: Callable[[Row, list[str]], str], devices: Devices, workers: int) -> Iterator[str]:
    """The log of each row, in order; so many at a time as workers and devices allow."""
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
    """Those that this machine can run, with one process of each model first; says why it leaves one out."""
    ones = [Row(row.model, Layout.named(ONE)) for row in rows if not row.length]
    chosen = []
    # a longer row is tried, and compared, once the shorter ones are known; few processes leave room for others
    for row in sorted(dict.fromkeys(ones + rows), key=lambda row: (row.length or 0, row.layout.processes)):
        reason = "" if torch.cuda.is_available() else row.impossible_without_gpu()
        if row.layout.processes > processes:
            reason = f"{row.layout.processes} processes, and there are {processes}"
        if reason:
            print(f"left out: {row.name}: {reason}", flush=True)
        else:
            chosen.append(row)
    return chosen


def save_picture(kind: Matrix, rows: list[Row], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = kind.draw(rows, plt)
    figure.suptitle(machine(), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help=f"default: {'; '.join(Matrix.layouts)}")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=NAMES + WIDE,
        metavar="MODEL",
        help=f"default: {'; '.join(Matrix.models)}; in the sweep {'; '.join(NAMES)}",
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="'HGRN2, TP2 SP', or in the sweep 'HGRN2, CP2, 4096'")
    parser.add_argument("--sweep", action="store_true", help="time and memory against the length of the sequence")
    parser.add_argument("--lengths", nargs="+", type=int, help=f"of the sweep, default {LENGTHS}")
    parser.add_argument("--model", help="Megatron's flags of the model and the batch, in one word")
    parser.add_argument("--tiny", action="store_true", help="a small model, for up to 8 processes without a GPU")
    parser.add_argument("--side-by-side", action="store_true", help="as many runs at a time as there are devices for")
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which a run is ended")
    args = parse(parser)
    script = script_in(args.megatron_lm)
    gpus = torch.cuda.device_count()
    if args.lengths and not args.sweep:
        parser.error("--lengths is of --sweep")
    if not (gpus or args.tiny or args.model):
        parser.error("no GPU: give --tiny, or a small --model")
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

        make_table([machine(), "", *kind.head], runs(), args.out)
    if args.out and kind.figures:
        save_picture(kind, rows, args.out / "picture.png")


if __name__ == "__main__":
    main()
