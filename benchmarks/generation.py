"""Measure decoding of HGRN2 and of attention in Megatron's static inference context: time of a step, and memory.

    python benchmarks/generation.py [--out FILE.json] [--tiny]

HGRN2 is a HybridModel of 24 HGRN2 layers and 24 MLPs. Attention is a GPT of 24 layers. Both have 2048 channels and
random weights in bf16, and run on one GPU, with Transformer Engine if it is installed. --tiny runs the whole script on
a toy model in seconds, without a GPU in fp32. Before it times anything, the script decodes tokens greedily after a
short prompt. At least 3 of 4 tokens must be the argmax of a forward of the whole sequence, or tie with it in the dtype.

Decoding steps do not start from a real prefill. They start from states and caches of the given length that hold random
numbers, because the time of a step does not depend on the values. A pass has 8 steps. Each step is a forward and an
argmax, whose tokens are the next input. All passes have the same 8 lengths. The first pass has a column of its own,
because it compiles for each length (cuDNN builds a plan for each). The other columns have the median of 4 more passes.
Only steps of HGRN2 are captured in a CUDA graph. Megatron slices its cache up to the offset, so each step of attention
has other shapes. Without a graph, steps after short contexts wait for the host.

Megatron caches keys without positions, and rotates the whole cache in every step. The row "no RoPE" is another model,
and its difference to the row above is the cost of this rotation. A cache of rotated keys would take the same time as
"no RoPE". "Unfused" is Transformer Engine without cuDNN. "Attention" is the backend that Transformer Engine chooses.
Prefill is one forward of a prompt of moderate length, with the logits of the last token only. Attention cannot continue
a prompt in this context. The script first estimates the largest batch from the bytes that a sequence takes in addition
to the weights, and lowers it while memory runs out. It stops at a cap, and then the row says so.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import report
import torch
from decoded_model import DTYPE, ON_GPU, TINY, WITH_TE, Sizes, build, release, start, synchronize
from decoder import MODELS, STEPS, Decoder, Way, applied, backend, check, forward
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor

PASSES, PREFILLS = 4, 3
# free memory in bytes that the script assumes on a CPU, where it tests no real limit
FREE_ON_CPU = 2**18


def filled(model: LanguageModule, batch: int, length: int, vocab: int) -> Decoder:
    """Return a decoder at this length whose states or caches hold random numbers."""
    context = StaticInferenceContext(batch, length + STEPS)
    # the first forward allocates the states and caches
    context.sequence_len_offset = length - 1
    tokens = torch.randint(vocab, (batch, 1), device="cuda")
    forward(model, tokens, context)
    for kept in context.key_value_memory_dict.values():
        for x in kept:
            x.normal_()
    return Decoder(model, context, tokens)


def pass_ms(decoder: Decoder, step: Callable[[], Tensor], length: int) -> float:
    """Run the steps of a pass from this length on, and return milliseconds per step."""
    decoder.context.sequence_len_offset = length
    synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return (time.perf_counter() - begin) / STEPS * 1000


def decode(model: LanguageModule, way: Way, batch: int, length: int, sizes: Sizes) -> dict:
    """Decode at a length, and return its row: milliseconds per step, bytes of states or cache, and peak memory."""
    release()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    with applied(dataclasses.replace(way, unfused=True), model):
        decoder = filled(model, batch, length, sizes.vocab)
    kept = sum(x.nbytes for pair in decoder.context.key_value_memory_dict.values() for x in pair)
    row = dict(way=way.name, context=length, batch=batch, bytes=kept)
    with applied(way, model):
        row["first_ms"] = pass_ms(decoder, decoder.step, length)
        row["ms"] = statistics.median(pass_ms(decoder, decoder.step, length) for _ in range(PASSES))
        row["backend"] = backend(way)
        if way.graph and ON_GPU:
            replay = decoder.capture()
            pass_ms(decoder, replay, length)
            row["graph_ms"] = statistics.median(pass_ms(decoder, replay, length) for _ in range(PASSES))
        row["peak"] = torch.cuda.max_memory_allocated() if ON_GPU else None
    return row


def largest(model: LanguageModule, way: Way, bytes_each: int, sizes: Sizes) -> dict:
    """Return the row of the largest batch that fits at the longest context.

    Args:
        bytes_each: number of bytes that the states or the cache of one sequence take.
    """
    release()
    free = torch.cuda.mem_get_info()[0] if ON_GPU else FREE_ON_CPU
    batch = fits = min(sizes.cap, free // bytes_each)
    while batch:
        try:
            row = decode(model, way, batch, max(sizes.contexts), sizes)
            return row | dict(largest="the cap" if batch == sizes.cap else f"{fits} by their bytes")
        except RuntimeError as error:
            # errors of torch, and of libraries that allocate memory by themselves
            if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
                raise
            print(f"{way.name}: out of memory at a batch of {batch}", flush=True)
        batch = min(batch - 1, int(batch * 0.95))
    raise MemoryError("not even a batch of 1 fits")


def prefill(model: LanguageModule, way: Way, sizes: Sizes) -> dict:
    """Return the row of a prompt in one forward, with its tokens/s."""
    release()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    context = StaticInferenceContext(sizes.batch, sizes.prompt)
    tokens = torch.randint(sizes.vocab, (sizes.batch, sizes.prompt), device="cuda")
    times = []
    with applied(way, model):
        for _ in range(PREFILLS + 1):
            context.reset()
            synchronize()
            begin = time.perf_counter()
            forward(model, tokens, context)
            synchronize()
            times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if ON_GPU else None
    seconds = statistics.median(times[1:])
    row = dict(way=way.name, prompt=sizes.prompt, batch=sizes.batch, tokens_per_second=tokens.numel() / seconds)
    return row | dict(peak=peak, backend=backend(way))


DECODE_HEAD = """\
| decoding | context | batch | first ms | ms per step | tokens/s | ms in a graph | tokens/s in a graph | \
states or cache MiB | MiB per sequence | peak GiB | attention on | largest batch |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
PREFILL_HEAD = """\
| prefill | prompt | batch | tokens/s | peak GiB | attention on |
|---|---|---|---|---|---|"""


def gib(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 2**30:.1f}"


def decode_line(row: dict) -> str:
    kept = row["bytes"] / 2**20
    per_second = [f"{row['batch'] / row[ms] * 1000:,.0f}" if ms in row else "" for ms in ("ms", "graph_ms")]
    graph = f"{row['graph_ms']:.2f}" if "graph_ms" in row else ""
    return (
        f"| {row['way']} | {row['context']} | {row['batch']} | {row['first_ms']:.2f} | {row['ms']:.2f} | "
        f"{per_second[0]} | {graph} | {per_second[1]} | {kept:,.3f} | {kept / row['batch']:,.3f} | "
        f"{gib(row['peak'])} | {row['backend']} | {row.get('largest', '')} |"
    )


def columns(row: dict) -> dict:
    """Return the columns of a row of decoding for the file of results."""
    if "error" in row:
        return {"model": row["way"], "note": row["error"]}
    result = {"model": row["way"], "context": row["context"], "batch": row["batch"], "ms per step": round(row["ms"], 2)}
    result["tokens/s"] = round(row["batch"] / row["ms"] * 1000)
    if "graph_ms" in row:
        result["ms per step in a graph"] = round(row["graph_ms"], 2)
        result["tokens/s in a graph"] = round(row["batch"] / row["graph_ms"] * 1000)
    result["states or cache MiB"] = round(row["bytes"] / 2**20, 3)
    result["peak GiB"] = round(row["peak"] / 2**30, 1) if row["peak"] else None
    result["attention on"] = row["backend"]
    if "largest" in row:
        result["note"] = f"largest batch: {row['largest']}"
    return result


def prefill_line(row: dict) -> str:
    return (
        f"| {row['way']} | {row['prompt']} | {row['batch']} | {row['tokens_per_second']:,.0f} | {gib(row['peak'])} | "
        f"{row['backend']} |"
    )


class Table:
    """A table that prints its rows as they are measured. A row that fails is printed with its error.

    Args:
        line: function that returns the line of a row.
        deadline: value of time.perf_counter after which no row starts.
    """

    def __init__(self, line: Callable[[dict], str], deadline: float):
        self.line, self.deadline = line, deadline
        self.rows: list[dict] = []

    def add(self, name: str, measure: Callable[..., dict], *args) -> dict | None:
        """Measure a row, and return it, or None if it failed."""
        try:
            if time.perf_counter() > self.deadline:
                raise TimeoutError("the time of --seconds is over: give more seconds, or fewer models")
            row = measure(*args)
        except Exception as error:
            self.fail(name, error)
            return None
        self.rows.append(row)
        print(self.line(row), flush=True)
        return row

    def fail(self, name: str, error: Exception):
        words = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        self.rows.append(dict(way=name, error=words))
        print(f"| {name} | failed: {words} |", flush=True)


def measure_model(kind: str, sizes: Sizes, prefills: Table, decodes: Table):
    """Measure all rows of a model. A model that decodes wrong tokens stops the program."""
    model = build(kind, sizes, STEPS)
    ways = []
    with torch.inference_mode(), InferenceMode.active():
        for way in MODELS[kind]:
            try:
                with applied(way, model):
                    ways.append(check(model, way, sizes))
            except Exception as error:
                decodes.fail(way.name, error)
        print(PREFILL_HEAD)
        for way in ways:
            # a prompt does not read Megatron's cache, so only the usual way is timed
            if way.name == kind:
                prefills.add(way.name, prefill, model, way, sizes)
        print(DECODE_HEAD)
        for way in ways:
            for length in sizes.contexts:
                row = decodes.add(f"{way.name}, {length}", decode, model, way, sizes.batch, length, sizes)
            if row:
                decodes.add(f"{way.name}, largest", largest, model, way, row["bytes"] // sizes.batch, sizes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="models to measure")
    parser.add_argument("--seconds", type=float, default=100, help="seconds after which no row is started")
    parser.add_argument("--tiny", action="store_true", help="run a toy model")
    report.add_option(parser)
    args = parser.parse_args()
    begin = time.perf_counter()
    start()
    sizes = TINY if args.tiny else Sizes()
    device = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"{device}, {DTYPE}, {'Transformer Engine' if WITH_TE else 'local'}: {sizes}", flush=True)
    prefills, decodes = (Table(line, begin + args.seconds) for line in (prefill_line, decode_line))
    try:
        for kind in args.models:
            measure_model(kind, sizes, prefills, decodes)
            release()
            print(f"{kind}: {time.perf_counter() - begin:.0f} s since the start\n", flush=True)
    finally:
        rows = [columns(row) for row in decodes.rows]
        report.write(args.out, rows, sizes=dataclasses.asdict(sizes), prefill=prefills.rows)
    torch.distributed.destroy_process_group()
    if any("error" in row for row in prefills.rows + decodes.rows):
        raise SystemExit("some rows could not be measured: their lines say why")


if __name__ == "__main__":
    main()
