"""What context parallelism costs: forward and backward of a model on every GPU of a host, by several ways.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py [--tokens 32768 65536 131072] [--layers 24] [--pattern H]

One sequence of so many tokens, split among all GPUs, 24 layers of 2048 in bf16 with Transformer Engine and full
recompute. Beside the states' way, in the same process on the same weights and in turn: "alone", where every chunk
starts from zeros and nothing is sent, which is the same local work and another model; and "heads", where q, f, v and o
of all tokens are exchanged by two all-to-alls so that each rank has some heads of whole sequences, as other linear
attentions do. It stops unless states and heads give the same loss. Times are medians of the slowest rank's CUDA events.
Bytes are those that a rank sends to others in the mixers of one layer, counted where they are sent; full recompute runs
the forward twice.
"""

import argparse
import os
import statistics
from collections.abc import Callable

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
    b, s = qfv.shape[:2]
    o, _ = chunk_hgrn2_fused(qfv.reshape(2 * b, s // 2, *qfv.shape[2:]), lower_bound)
    return o.reshape(b, s, *o.shape[2:])


def heads(qfv: Tensor, lower_bound: Tensor | None, group) -> Tensor:
    """A rank's share of the heads over the whole sequence, of a batch of one."""
    cp, (s, H) = group.size(), qfv.shape[1:3]
    # [cp, s, H/cp, 3, K]: of each rank its tokens
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
    """Bytes that all-to-alls send to other ranks."""

    def __init__(self):
        self.sent = 0
        self.original = torch.distributed.all_to_all_single
        torch.distributed.all_to_all_single = self

    def __call__(self, received, x, *args, group=None, **options):
        cp = group.size()
        self.sent += x.nbytes * (cp - 1) // cp
        return self.original(received, x, *args, group=group, **options)


def build(layers: int, pattern: str, tokens: int, cp: int) -> GPTModel:
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
    """Milliseconds of a forward and backward, the slowest rank's, and the mean loss of all ranks."""
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


def measure(model: GPTModel, counter: Counter, num_tokens: int, layers: int, rounds: int) -> str:
    """Table lines of one length."""
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
            if turn:  # the first compiles
                times[name].append(milliseconds)
    if not abs(losses["states"] - losses["heads"]) <= 1e-3:
        raise SystemExit(f"the ways do not agree, losses {losses}: not timed")
    local = statistics.median(times["alone"])
    lines = []
    for name in WAYS:
        ms = statistics.median(times[name])
        lines.append(
            f"| {num_tokens} | {name} | {ms:.1f} | {ms / local - 1:+.1%} | {num_tokens / ms / cp * 1000:,.0f} | "
            f"{sent[name] / 2**20:.2f} | {peak[name]:.1f} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768, 65536, 131072], help="of all ranks")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pattern", default="H")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    cp = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(context_parallel_size=cp)
    model_parallel_cuda_manual_seed(0)
    model = build(args.layers, args.pattern, max(args.tokens), cp)
    counter = Counter()
    lines = [measure(model, counter, num_tokens, args.layers, args.rounds) for num_tokens in args.tokens]
    if torch.distributed.get_rank() == 0:
        formula = bytes_sent(1, 0, HIDDEN // K, K, cp, 2) / 2**20
        print(f"{torch.cuda.get_device_name()} x {cp}: {args.layers} layers of {HIDDEN}, pattern {args.pattern}")
        print(
            f"a layer's states by formula: {formula:.2f} MiB forward and backward, {1.5 * formula:.2f} with recompute"
        )
        print("| tokens | way | ms | beside alone | tokens/s a GPU | MiB sent a layer | peak GiB |")
        print("|---|---|---|---|---|---|---|")
        print("\n".join(lines), flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
