"""Measure fla's HGRN2ForCausalLM before and after `hgrn2_kernels.for_fla.replace`, and beside `hgrn2_kernels.hf`.

    python benchmarks/fla_model.py [--models NAME ...] [--out FILE.json] [--tiny]

The model has 24 layers of 2048 channels, heads of 128 and random weights. The script needs fla
(flash-linear-attention 0.6.0), transformers 5.24 and one GPU, and runs in bf16. --tiny runs the whole script on a toy
model in fp32, on a GPU or on a CPU. On a CPU, fla's kernels run in Triton's interpreter, so its times mean nothing
there, and the lengths stay below those at which fla takes its chunk kernels, which the interpreter cannot run.

Before it times anything, the script compares all models on the same tokens. In bf16 each model is compared with fla's
own model in fp32 and in its mode fused_recurrent, and the others may be at most 1.5 times as far from it as fla is. In
fp32 all models must agree up to rounding. The script compares the logits, the gradients of all parameters, and the
states that a prefill leaves behind. After `restore`, fla's logits and states must have the bits that they had at first.

A training step is a forward with the loss, a backward without recompute, and a step of AdamW. A prefill is a forward
that fills the cache and returns the logits of the last token. Decoding feeds single tokens after a prefill, one argmax
each, in plain PyTorch without a CUDA graph. Times are medians of several passes after passes that compile and tune.
For a training step, "kernels ms" is the time of all kernels on the GPU, and "products ms" that of the matrix products
outside the operator, both from torch's profiler.

The rows "fla, restored" repeat fla, so they show how much the times drift. --models leaves out models. With the
operator, all other code is still fla's: embedding, projections, norms, MLPs, the output layer and the loss.
`hgrn2_kernels.hf` has none of fla's fused parts.
"""

import argparse
import gc
import re
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))
import evaluate_exported

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    # before fla decorates its kernels
    evaluate_exported.interpret()

import report  # noqa: E402
from fla.models import HGRN2Config, HGRN2ForCausalLM  # noqa: E402
from torch import Tensor  # noqa: E402

from hgrn2_kernels import for_fla, hf  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
# how much farther than fla the operator may be from the exact results in bf16, and how far from fla in fp32
FARTHER, FP32 = 1.5, 1e-4
FLA, OPERATOR, RESTORED, OWN = "fla", "with the operator", "fla, restored", "hgrn2_kernels.hf"
MODELS = [FLA, OPERATOR, RESTORED, OWN]
# names of the kernels of matrix products in cuBLAS and CUTLASS
PRODUCTS = re.compile("gemm|nvjet|cutlass|xmma", re.IGNORECASE)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model and of the runs.

    Attributes:
        layers, hidden, head, vocab: the model.
        training, prefill: batch and tokens of a sequence.
        decoding: batches that are decoded.
        prompt, steps: tokens before a decoding pass, and in it.
        warmups, passes: passes that are not timed, and that are.
        check: batch and tokens of the comparison.
    """

    layers: int = 24
    hidden: int = 2048
    head: int = 128
    vocab: int = 32000
    training: tuple[tuple[int, int], ...] = ((4, 4096), (1, 16384))
    prefill: tuple[tuple[int, int], ...] = ((8, 4096), (1, 32768))
    decoding: tuple[int, ...] = (1, 32)
    prompt: int = 1024
    steps: int = 64
    warmups: int = 3
    passes: int = 10
    check: tuple[int, int] = (2, 700)


TINY = Sizes(2, 32, 16, 61, ((2, 9),), ((2, 9),), (2,), prompt=8, steps=1, warmups=0, passes=1, check=(2, 9))


def build(sizes: Sizes, dtype: torch.dtype, mode: str = "chunk") -> HGRN2ForCausalLM:
    """Return fla's model with the same random weights at each call, rounded to bf16."""
    fused = dict(fuse_norm=ON_GPU, fuse_swiglu=ON_GPU, fuse_cross_entropy=ON_GPU)
    config = HGRN2Config(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        expand_ratio=sizes.head,
        vocab_size=sizes.vocab,
        attn_mode=mode,
        **fused,
    )
    torch.manual_seed(0)
    # a GPU draws the weights much faster
    with torch.device(DEVICE):
        model = HGRN2ForCausalLM(config)
    with torch.no_grad():
        # they start as zeros, which would give all channels of a layer one bound
        model.model.lower_bounds.normal_()
    return model.bfloat16().to(dtype)


def own(model: HGRN2ForCausalLM) -> hf.HGRN2ForCausalLM:
    """Return the model of this project with the settings and a copy of the weights of fla's model."""
    with torch.device(DEVICE):
        made = hf.HGRN2ForCausalLM(hf.HGRN2Config(**model.config.to_diff_dict())).to(model.dtype)
    made.load_state_dict(model.state_dict())
    return made


def tokens(batch: int, length: int, vocab: int) -> Tensor:
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def results(model, sizes: Sizes) -> dict[str, Tensor]:
    """Return logits, gradients and, for fla's model, the states of a prefill, in fp32 on the host."""
    model.train()
    batch = tokens(*sizes.check, sizes.vocab)
    logits = model(batch).logits
    model.zero_grad()
    logits.float().square().mean().backward()
    found = {"logits": logits} | {name: p.grad for name, p in model.named_parameters()}
    if isinstance(model, HGRN2ForCausalLM):
        with torch.inference_mode():
            cache = model.eval()(batch, use_cache=True).cache
        found |= {f"state of layer {i}": cache[i]["recurrent_state"] for i in range(len(cache))}
    model.zero_grad()
    return {name: x.detach().float().cpu() for name, x in found.items()}


def error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def check(sizes: Sizes, dtype: torch.dtype) -> dict[str, float]:
    """Compare all models, and return the largest error of each. A result that is wrong ends the script."""
    model = build(sizes, dtype)
    found = {FLA: results(model, sizes), OWN: results(own(model), sizes)}
    for_fla.replace(model)
    found[OPERATOR] = results(model, sizes)
    for_fla.restore(model)
    again = results(model, sizes)
    # gradients are left out, because a GPU may sum them in another order each time
    compared = [name for name in again if name == "logits" or name.startswith("state")]
    changed = [name for name in compared if not torch.equal(found[FLA][name], again[name])]
    del model
    release()
    exact = results(build(sizes, torch.float32, "fused_recurrent"), sizes)
    errors = {side: {name: error(x, exact[name]) for name, x in parts.items()} for side, parts in found.items()}
    allowed = {name: FP32 if dtype == torch.float32 else FARTHER * far for name, far in errors[FLA].items()}
    wrong = {
        (side, name): f"{far:.1e}, {allowed[name]:.1e} is allowed"
        for side in (OPERATOR, OWN)
        for name, far in errors[side].items()
        if not far <= allowed[name]
    }
    if wrong or changed:
        sys.exit(f"errors that are too large: {wrong}; not restored: {changed}")
    worst = {side: max(parts.values()) for side, parts in errors.items()}
    print("largest relative errors:", ", ".join(f"{side} {far:.1e}" for side, far in worst.items()), flush=True)
    return worst


def release():
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds(run: Callable[[], object], sizes: Sizes) -> float:
    """Return the median time of a pass."""
    times = []
    for _ in range(sizes.warmups + sizes.passes):
        begin = time.perf_counter()
        run()
        if ON_GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[sizes.warmups :])


def kernels(run: Callable[[], object]) -> dict[str, float | None]:
    """Return the milliseconds of all kernels in a pass, and of its matrix products."""
    if not ON_GPU:
        return {"kernels ms": None, "products ms": None}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times = {event.key: event.self_device_time_total / 1000 for event in profile.key_averages()}
    products = sum(ms for name, ms in times.items() if PRODUCTS.search(name))
    return {"kernels ms": round(sum(times.values()), 1), "products ms": round(products, 1)}


def training_row(model, sizes: Sizes, batch: int, length: int) -> dict:
    """Return the row of a training step. The optimizer and its state are gone afterwards."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=ON_GPU)
    data = tokens(batch, length, sizes.vocab)

    def train():
        model(data, labels=data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    row = timed(f"training step, {batch} x {length}", lambda: seconds(train, sizes), batch * length)
    return row | kernels(train)


def measure(model, sizes: Sizes) -> Iterator[dict]:
    """Yield a row per run: its name, milliseconds, tokens/s, peak memory, and the kernels of a training step."""
    for batch, length in sizes.training:
        yield training_row(model, sizes, batch, length)
    model.zero_grad()
    model.eval()
    with torch.inference_mode():
        for batch, length in sizes.prefill:
            data = tokens(batch, length, sizes.vocab)

            def prefill(data=data):
                model(data, use_cache=True, logits_to_keep=1)

            yield timed(f"prefill, {batch} x {length}", lambda: seconds(prefill, sizes), batch * length)
        for batch in sizes.decoding:
            prompt = tokens(batch, sizes.prompt, sizes.vocab)
            state = types.SimpleNamespace(cache=model(prompt, use_cache=True).cache, token=prompt[:, -1:])

            def decode(state=state):
                for _ in range(sizes.steps):
                    out = model(state.token, past_key_values=state.cache, use_cache=True)
                    state.token = out.logits[:, -1:].argmax(-1)

            yield timed(f"decoding, batch {batch}", lambda: seconds(decode, sizes) / sizes.steps, batch)


def timed(name: str, time_it: Callable[[], float], count: int) -> dict:
    """Return a row of the table.

    Args:
        name: name of the run.
        time_it: returns the seconds of a pass or a step.
        count: tokens of a pass or a step.
    """
    release()
    took = time_it()
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if ON_GPU else None
    return {"run": name, "ms": took * 1000, "tokens/s": round(count / took), "peak GiB": peak}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    report.add_option(parser)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="the models to time")
    parser.add_argument("--tiny", action="store_true", help="a toy model in fp32, on a GPU or a CPU")
    options = parser.parse_args()
    if not (ON_GPU or options.tiny):
        sys.exit("there is no GPU: give --tiny to run the script on a toy model")
    sizes, dtype = (TINY, torch.float32) if options.tiny else (Sizes(), torch.bfloat16)
    errors = check(sizes, dtype)
    model = build(sizes, dtype)
    rows = []
    for name in filter(options.models.__contains__, MODELS):
        if name == OPERATOR:
            for_fla.replace(model)
        if name == OWN:
            # the last model, so fla's is not kept
            model = own(model)
        for found in measure(model, sizes):
            rows.append({"run": found.pop("run"), "model": name} | found)
            print(rows[-1], flush=True)
        if name == OPERATOR:
            for_fla.restore(model)
    before = {found["run"]: found["ms"] for found in rows if found["model"] == FLA}
    order = list(dict.fromkeys(found["run"] for found in rows))
    rows.sort(key=lambda found: order.index(found["run"]))
    for found in rows:
        faster = round(before[found["run"]] / found["ms"], 2) if before else None
        found |= {"times as fast": faster, "ms": round(found["ms"], 3)}
    columns = ["run", "model", "ms", "tokens/s", "times as fast", "peak GiB", "kernels ms", "products ms"]
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for found in rows:
        print("|", " | ".join(str(found.get(column, "")) for column in columns), "|")
    report.write(options.out, rows, errors=errors)


if __name__ == "__main__":
    main()
