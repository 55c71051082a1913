"""One HGRN2 model in every layout that the GPUs of one host allow, through Megatron-LM's own loop on mock data.

    python benchmarks/scaling.py path/to/Megatron-LM [--out FOLDER] [--layouts NAME ...] [--model FLAGS] [-- more flags]

One process first writes a checkpoint of fresh weights, because Megatron draws each pipeline stage's on its own; every
layout then trains from it for 12 iterations of the same batches. The table gives tokens/s a GPU (median of the
iterations after the fourth), peak memory, the first and the last loss, the largest difference of a loss to that of one
GPU, and the largest of the gradient's norm as a share. One GPU with another micro-batch says how much of these is the
rounding of bf16. Without GPUs it runs over gloo in fp32: give a small --model.
"""

import shlex
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from pretrain import command_line, make_table, numbers, parse, run, script_in

MODEL = """--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --seq-length 4096
    --max-position-embeddings 4096 --vocab-size 32000 --micro-batch-size 2 --global-batch-size 8"""
LOOP = """--spec hgrn2 --mock-data --tokenizer-type NullTokenizer --untie-embeddings-and-output-weights --train-iters 12
    --lr 3e-5 --lr-warmup-iters 2 --log-interval 1 --eval-iters 0 --eval-interval 100"""
GPU = "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
OVERLAP = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
# name -> processes and flags; a batch of 8 needs a number of micro-batches that pipelines divide
LAYOUTS = {
    "one": (1, ""),
    "one, micro-batch 1": (1, "--micro-batch-size 1"),
    "DP2": (2, OVERLAP),
    "TP2 SP": (2, "--tensor-model-parallel-size 2 --sequence-parallel"),
    "TP2 SP, overlapped": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap --tp-comm-bootstrap-backend nccl",
    ),
    "CP2": (2, "--context-parallel-size 2"),
    "PP2": (2, "--pipeline-model-parallel-size 2"),
    "PP2 VPP2": (2, "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2"),
    "DP4": (4, OVERLAP),
    "TP2 PP2": (4, "--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2"),
    "TP2 PP2 DP2": (
        8,
        f"--tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2 {OVERLAP}",
    ),
}


def row(name: str, processes: int, log: str, one: str, tokens: int) -> str:
    """One line of the table, or what went wrong."""
    losses, norms = numbers("lm loss", log), numbers("grad norm", log)
    times = numbers(r"elapsed time per iteration \(ms\)", log)[4:]
    if not times:
        return f"| {name} | failed: see the log | | | | |"
    peak = max(numbers("max allocated", log), default=float("nan"))
    apart = max(abs(x - y) for x, y in zip(losses, numbers("lm loss", one), strict=True))
    norms_apart = max(abs(x / y - 1) for x, y in zip(norms, numbers("grad norm", one), strict=True))
    rate = tokens / statistics.median(times) * 1000 / processes
    return (
        f"| {name} | {rate:,.0f} | {peak / 1024:.1f} | {losses[0]:.4f} -> {losses[-1]:.4f} | "
        f"{apart:.1e} | {norms_apart:.1e} |"
    )


def runs(script: Path, common: list[str], chosen: list[str], tokens: int) -> Iterator[tuple[str, str, str]]:
    """Name, log and line of one process and of each chosen layout; tokens are an iteration's."""
    with tempfile.TemporaryDirectory() as folder:
        save = ["--save", folder, "--save-interval", "1", "--no-save-optim", "--no-save-rng", "--exit-interval", "1"]
        # a learning rate of nearly 0: the checkpoint has the weights as drawn
        log = run(script, True, [*common, *save, "--lr", "1e-30"])
        if not (Path(folder) / "latest_checkpointed_iteration.txt").is_file():
            raise SystemExit(f"the first weights could not be written:\n{log[-3000:]}")
        one = ""
        for name in dict.fromkeys(["one", *chosen]):
            processes, flags = LAYOUTS[name]
            load = ["--load", folder, "--finetune", "--no-load-optim"]
            log = run(script, True, [*common, *flags.split(), *load], processes)
            one = one or log
            yield name, log, row(name, processes, log, one, tokens)


def main():
    parser = command_line(__doc__)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="default: all that the GPUs allow")
    parser.add_argument("--model", default=MODEL, help="Megatron's flags of the model and the batch, in one word")
    args = parse(parser)
    script = script_in(args.megatron_lm)
    gpus = torch.cuda.device_count()
    common = shlex.split(f"{args.model} {LOOP} {GPU if gpus else ''}") + args.extra
    length, batch = (int(common[common.index(name) + 1]) for name in ("--seq-length", "--global-batch-size"))
    chosen = args.layouts or [name for name, (processes, _) in LAYOUTS.items() if processes <= max(gpus, 1)]
    head = [
        "| layout | tokens/s a GPU | peak GiB | loss, first -> last | loss apart | norm apart |",
        "|---|---|---|---|---|---|",
    ]
    make_table(head, runs(script, common, chosen, length * batch), args.out)


if __name__ == "__main__":
    main()
