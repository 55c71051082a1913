"""Measure the cost of context parallelism: time a forward and backward on all GPUs of a host in three ways.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py [--tokens 32768 65536 131072] [--layers 24] [--pattern H]
        [--out FILE.json]

One sequence is split among all GPUs. The model has 24 layers of 2048 channels in bf16, with Transformer Engine and full
recompute. The three ways run in turn, in the same process and with the same weights:

- states: the ranks exchange states, as the mixer does.
- alone: every chunk starts from a state of zeros, and the ranks send nothing. Each rank does the same work as before,
  but the model is another one.
- heads: two all-to-alls exchange q, f, v and o of all tokens, so that each rank computes some heads over the whole
  sequence. Other linear attentions do this.

The benchmark stops unless states and heads give the same loss. A time is the median over rounds of the slowest rank's
time, measured by CUDA events. The benchmark also counts the bytes that a rank sends to other ranks in the mixer of one
layer. Full recompute runs the forward twice, and both are counted.
"""

import argparse
import os
import statistics
from collections.abc import Callable

import report
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron import mixer
from hgrn2_megatron.arguments import BLOCK, HGRN2TransformerConfig
from hgrn2_megatron.context_parallel.exchange import bytes_sent
from hgrn2_megatron.spec import hgrn2

HIDDEN, K, VOCAB = 2048, 128, 32000


def alone(qfv: Tensor, lower_bound: Tensor | None, group) -> Tensor:
    """Compute each chunk of this rank from a zero state. qfv is [B, T, H, 3, K]."""
    b, s = qfv.shape[:2]
    o, _ = chunk_hgrn2_fused(qfv.reshape(2 * b, s // 2, *qfv.shape[2:]), lower_bound)
    return o.reshape(b, s, *o.shape[2:])


def heads(qfv: Tensor, lower_bound: Tensor | None, group) -> Tensor:
    """Compute this rank's share of the heads over the whole sequence. qfv is [1, T, H, 3, K]."""
    cp, (s, H) = group.size(), qfv.shape[1:3]
    # [cp, s, H/cp, 3, K]: the heads for each rank, of this rank's tokens
    sent = qfv[0].unflatten(1, (cp, H // cp)).transpose(0, 1).contiguous()
    whole = all_to_all(group, sent.flatten(0, 1)).unflatten(0, (cp, 2, s // 2))
    whole = torch.cat([whole[:, 0], whole[:, 1].flip(0)]).flatten(0, 1)[None]
    o, _ = chunk_hgrn2_fused(whole, lower_bound.chunk(cp)[group.rank()])
    first, second = o[0].unflatten(0, (2 * cp, s // 2)).chunk(2)
    back = torch.stack([first, second.flip(0)], 1).flatten(0, 2)
    o = all_to_all(group, back).unflatten(0, (cp, s))
    return o.transpose(0, 1).flatten(1, 2)[None]


WAYS: dict[str, Callable] = {"states": mixer.chunk_hgrn2_of_batch, "alone": alone, "heads": heads}


class Counter:
    """A counter of the bytes that all-to-alls send to other ranks."""

    def __init__(self):
        self.sent = 0
        self.original = torch.distributed.all_to_all_single
        torch.distributed.all_to_all_single = self

    def __call__(self, received, x, *args, group=None, **options):
        cp = group.size()
        self.sent += x.nbytes * (cp - 1) // cp
        return self.original(received, x, *args, group=group, **options)


def build(layers: int, pattern: str, tokens: int, cp: int) -> GPTModel:
    """Return a model in bf16 on this rank's GPU."""
    config = HGRN2TransformerConfig(
        **BLOCK,
        num_layers=layers,
        hidden_size=HIDDEN,
        ffn_hidden_size=5632,
        num_attention_heads=HIDDEN // K,
        hgrn2_layer_pattern=pattern,
        context_parallel_size=cp,
        bf16=True,
        params_dtype=torch.bfloat16,
        transformer_impl="transformer_engine",
        gradient_accumulation_fusion=False,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        cross_entropy_loss_fusion=True,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=hgrn2,
        vocab_size=VOCAB,
        max_sequence_length=tokens,
        position_embedding_type="rope" if "*" in pattern else "none",
    )
    return model.cuda().bfloat16()


def step(model: GPTModel, tokens: Tensor, labels: Tensor) -> tuple[float, float]:
    """Run forward and backward. Return the slowest rank's milliseconds, and the mean loss of all ranks."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.distributed.barrier()
    torch.cuda.synchronize()
    start.record()
    loss = model(tokens, None, None, labels=labels).mean()
    loss.backward()
    end.record()
    torch.cuda.synchronize()
    slowest = torch.tensor(start.elapsed_time(end), device="cuda")
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    loss = loss.detach().float()
    torch.distributed.all_reduce(loss, op=torch.distributed.ReduceOp.AVG)
    return slowest.item(), loss.item()


def measure(model: GPTModel, counter: Counter, num_tokens: int, layers: int, rounds: int) -> list[dict]:
    """Return the results of one length: a row for each way."""
    cp = parallel_state.get_context_parallel_world_size()
    tokens = torch.randint(VOCAB, (2, 1, num_tokens // cp), device="cuda")
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    sent, peak, losses = {}, {}, {}
    for turn in range(rounds + 1):
        for name, way in WAYS.items():
            mixer.chunk_hgrn2_of_batch = way
            before = counter.sent
            torch.cuda.reset_peak_memory_stats()
            milliseconds, losses[name] = step(model, *tokens)
            sent[name] = (counter.sent - before) / layers
            peak[name] = torch.cuda.max_memory_allocated() / 2**30
            if turn:  # the first round compiles
                times[name].append(milliseconds)
    if not abs(losses["states"] - losses["heads"]) <= 1e-3:
        raise SystemExit(f"states and heads give different losses, {losses}: the times are not printed")
    local = statistics.median(times["alone"])
    rows = []
    for name in WAYS:
        ms = statistics.median(times[name])
        row = {
            "tokens": num_tokens,
            "way": name,
            "ms": round(ms, 1),
            "% slower than alone": round(100 * (ms / local - 1), 1),
        }
        row |= {
            "tokens/s per GPU": round(num_tokens / ms / cp * 1000),
            "MiB sent per layer": round(sent[name] / 2**20, 2),
        }
        rows.append(row | {"peak GiB": round(peak[name], 1)})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=int,
        default=[32768, 65536, 131072],
        help="lengths of the sequence in tokens, over all ranks",
    )
    parser.add_argument("--layers", type=int, default=24, help="number of layers of the model")
    parser.add_argument("--pattern", default="H", help="layer pattern, as in --hgrn2-layer-pattern")
    parser.add_argument("--rounds", type=int, default=5, help="number of timed rounds")
    report.add_option(parser)
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it with torchrun and one process for each GPU, as its first lines show")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU, and the benchmark times GPUs")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    cp = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(0)
    model = build(args.layers, args.pattern, max(args.tokens), cp)
    counter = Counter()
    rows = [row for tokens in args.tokens for row in measure(model, counter, tokens, args.layers, args.rounds)]
    if torch.distributed.get_rank() == 0:
        formula = bytes_sent(1, 0, HIDDEN // K, K, cp, 2) / 2**20
        print(f"{torch.cuda.get_device_name()} x {cp}: {args.layers} layers of {HIDDEN}, pattern {args.pattern}")
        print(f"states of a layer by the formula: {formula:.2f} MiB for forward and backward", end="")
        print(f", {1.5 * formula:.2f} with full recompute, which runs the forward twice")
        print(f"| {' | '.join(rows[0])} |\n" + "|---" * len(rows[0]) + "|")
        print("\n".join(f"| {' | '.join(f'{x}' for x in row.values())} |" for row in rows), flush=True)
        report.write(args.out, rows, layers=args.layers, pattern=args.pattern)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
