"""Tokens/s of Megatron-LM's pretraining on one GPU: attention, HGRN2 by the launcher, HGRN2 without it.

    python benchmarks/pretrain.py path/to/Megatron-LM [--out FOLDER] [-- extra Megatron flags]

Runs the unmodified pretrain_gpt.py on mock data once for each row, in bf16 with Transformer Engine, and prints
one table: 24 layers of 2048, 16 heads, GLU 5632, sequence 4096, vocabulary 32000. The median of the logged
iterations after the first two counts.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SEQ, GLOBAL_BATCH = 4096, 8

COMMON = f"""
    --num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632
    --seq-length {SEQ} --max-position-embeddings {SEQ} --micro-batch-size 4 --global-batch-size {GLOBAL_BATCH}
    --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --untie-embeddings-and-output-weights
    --bf16 --transformer-impl transformer_engine --use-distributed-optimizer --no-gradient-accumulation-fusion
    --train-iters 12 --lr 3e-4 --lr-warmup-iters 2 --log-interval 1 --eval-iters 0 --eval-interval 100
""".split()
BLOCK = """
    --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0
""".split()
ROWS = {
    "attention": (False, [*BLOCK, "--position-embedding-type", "rope"]),
    "HGRN2, launcher": (True, ["--spec", "hgrn2"]),
    "HGRN2, two words": (
        False,
        [*BLOCK, "--position-embedding-type", "none", "--spec", "hgrn2_megatron.spec", "hgrn2"],
    ),
}


def run(script: Path, launcher: bool, flags: list[str], processes: int = 1) -> str:
    """Megatron's output for one row."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "hgrn2_megatron", str(script)] if launcher else [str(script)]
    path = [str(ROOT), str(ROOT / "kernels"), str(script.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": ":".join(path), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    # a checkout builds its dataset helpers with the python3 of PATH
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    done = subprocess.run(command + flags, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def numbers(name: str, log: str) -> list[float]:
    """What Megatron logged under a name, a regular expression."""
    return [float(x) for x in re.findall(rf"{name}: (\S+)", log)]


def row(name: str, log: str) -> str:
    """One line of the table, or what went wrong."""
    losses = numbers("lm loss", log)
    times = numbers(r"elapsed time per iteration \(ms\)", log)[2:]
    if not times:
        return f"| {name} | failed: see the log | | | |"
    peak = max(numbers("max allocated", log), default=float("nan"))
    tokens = SEQ * GLOBAL_BATCH / statistics.median(times) * 1000
    banner = next(iter(re.findall(r"^HGRN2: .*", log, re.M)), "")
    return f"| {name} | {tokens:,.0f} | {peak / 1024:.1f} | {losses[0]:.3f} -> {losses[-1]:.3f} | {banner} |"


def command_line(doc: str) -> argparse.ArgumentParser:
    """What every benchmark of Megatron's loop takes."""
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("megatron_lm", type=Path)
    parser.add_argument("--out", type=Path, help="folder for the table and the full logs")
    parser.add_argument("extra", nargs="*", help="further Megatron flags, after --")
    return parser


def script_in(megatron_lm: Path) -> Path:
    """A checkout's pretrain_gpt.py."""
    script = megatron_lm.resolve() / "pretrain_gpt.py"
    if not script.is_file():
        raise SystemExit(f"{script} is not a file: give the folder of a Megatron-LM checkout")
    return script


def make_table(head: list[str], runs: Iterable[tuple[str, str, str]], out: Path | None):
    """Print the lines of runs (name, log, line of the table) as they end, then the table; keep all of it in out."""
    table = list(head)
    for name, log, line in runs:
        if out:
            (out / f"{name.replace(', ', '-').replace(' ', '-')}.log").write_text(log)
        table.append(line)
        print(line, flush=True)
    print("\n".join(table))
    if out:
        (out / "table.md").write_text("\n".join(table) + "\n")


def runs(script: Path, extra: list[str]) -> Iterator[tuple[str, str, str]]:
    for name, (launcher, flags) in ROWS.items():
        log = run(script, launcher, [*COMMON, *flags, *extra])
        yield name, log, row(name, log)


def main():
    args = command_line(__doc__).parse_args()
    head = ["| run | tokens/s | peak GiB | loss, first -> last | banner |", "|---|---|---|---|---|"]
    make_table(head, runs(script_in(args.megatron_lm), args.extra), args.out)


if __name__ == "__main__":
    main()
