"""Decoding: time a step and memory of a pure HGRN2 model beside attention, in Megatron's static inference context.

    python benchmarks/generation.py [--json FILE] [--tiny]

24 layers of 2048 with random weights in bf16 on one GPU, Transformer Engine where there is one. --tiny is the whole
script on a toy model, in seconds, without a GPU in fp32. Before anything is timed, tokens decoded greedily after a
short prompt must be the argmax of the forward of the whole sequence, but for ties of the dtype: at least 3 in 4.

Decode steps start from states and caches of random numbers, as long as the context says, instead of a prefill of that
length: no step's time depends on the values. A pass is 8 steps, each a forward and an argmax that is fed back; passes
repeat the same 8 lengths. The first one counts apart, what is compiled for a length included (cuDNN builds a plan for
each); then comes the median of 4. Only HGRN2 steps are captured in a CUDA graph: Megatron's cache is sliced up to the
offset, so that no two steps of attention are the same. Without a graph short contexts wait for the host.

Megatron keeps keys without positions and rotates the whole cache in every step. What that costs is the difference to
"no RoPE", another model, which is also what a cache of rotated keys would cost. "unfused" is Transformer Engine without
cuDNN, "attention" its own choice. Prefill is one forward of a moderate prompt with the last token's logits only;
attention cannot continue a prompt in this context. The largest batch is what fits beside the weights by the bytes that
a sequence takes, tried and lowered while memory runs out; it is capped, and a row says where the cap was the limit.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decoded_model import DTYPE, ON_GPU, TINY, WITH_TE, Sizes, build, release, start, synchronize
from decoder import MODELS, STEPS, Decoder, Way, applied, backend, check, forward
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.models.gpt import GPTModel
from torch import Tensor

PASSES, PREFILLS = 4, 3
# a CPU has no limit that this script would reach
FREE_ON_CPU = 2**18


def filled(model: GPTModel, batch: int, length: int, vocab: int) -> Decoder:
    """A decoder at this length whose states or caches are random numbers."""
    context = StaticInferenceContext(batch, length + STEPS)
    # Megatron and the mixer make them where they are first needed
    context.sequence_len_offset = length - 1
    tokens = torch.randint(vocab, (batch, 1), device="cuda")
    forward(model, tokens, context)
    for kept in context.key_value_memory_dict.values():
        for x in kept:
            x.normal_()
    return Decoder(model, context, tokens)


def pass_ms(decoder: Decoder, step: Callable[[], Tensor], length: int) -> float:
    """Milliseconds a step, over the steps from this length on."""
    decoder.context.sequence_len_offset = length
    synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return (time.perf_counter() - begin) / STEPS * 1000


def decode(model: GPTModel, way: Way, batch: int, length: int, sizes: Sizes) -> dict:
    """One row: the figures of decoding at a length."""
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


def largest(model: GPTModel, way: Way, bytes_each: int, sizes: Sizes) -> dict:
    """The row of the largest batch at the longest context.

    Args:
        bytes_each: of states or cache a sequence.
    """
    release()
    free = torch.cuda.mem_get_info()[0] if ON_GPU else FREE_ON_CPU
    batch = fits = min(sizes.cap, free // bytes_each)
    while batch:
        try:
            row = decode(model, way, batch, max(sizes.contexts), sizes)
            return row | dict(largest="the cap" if batch == sizes.cap else f"{fits} by their bytes")
        except RuntimeError as error:
            # torch's own and those of libraries that allocate for themselves
            if not any(words in str(error) for words in ("out of memory", "ALLOC_FAILED")):
                raise
            print(f"{way.name}: out of memory at a batch of {batch}", flush=True)
        batch = min(batch - 1, int(batch * 0.95))
    raise MemoryError("not even a batch of 1 fits")


def prefill(model: GPTModel, way: Way, sizes: Sizes) -> dict:
    """Tokens/s of a prompt in one forward."""
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
| decoding | context | batch | first ms | ms a step | tokens/s | ms, graph | tokens/s, graph | states or cache, MiB | \
MiB a sequence | peak GiB | attention on | largest batch |
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


def prefill_line(row: dict) -> str:
    return (
        f"| {row['way']} | {row['prompt']} | {row['batch']} | {row['tokens_per_second']:,.0f} | {gib(row['peak'])} | "
        f"{row['backend']} |"
    )


class Table:
    """Rows as they are measured; one that fails is printed with its error, and the others go on."""

    def __init__(self, line: Callable[[dict], str], deadline: float):
        self.line, self.deadline = line, deadline
        self.rows: list[dict] = []

    def add(self, name: str, measure: Callable[..., dict], *args) -> dict | None:
        """The row, None where there is none."""
        try:
            if time.perf_counter() > self.deadline:
                raise TimeoutError("--seconds are over")
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
    """All rows of a model; one that decodes other tokens stops everything."""
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
            # prompts are no question of Megatron's cache: the usual way alone
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
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--seconds", type=float, default=100, help="start no row after so many")
    parser.add_argument("--tiny", action="store_true", help="a toy model")
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
        if args.json:
            figures = dict(device=device, sizes=dataclasses.asdict(sizes), prefill=prefills.rows, decode=decodes.rows)
            args.json.write_text(json.dumps(figures, indent=1))
    torch.distributed.destroy_process_group()
    if any("error" in row for row in prefills.rows + decodes.rows):
        raise SystemExit("not every row could be measured")


if __name__ == "__main__":
    main()
