"""Small runs of Megatron's own loop through the launcher."""

import re

import harness

FLAGS = """
    --num-layers 2 --hidden-size 64 --hgrn2-expand-ratio 32 --num-attention-heads 2 --seq-length 64
    --max-position-embeddings 64 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-3
    --log-interval 1 --eval-iters 1 --eval-interval 8 --use-cpu-initialization
""".split()
OURS = "examples/pretrain_gpt.py"
HGRN2 = ("--spec", "hgrn2")
LAUNCHER = ("-m", "hgrn2_megatron")


def train(
    *flags, script: str = OURS, num_processes: int = 1, launcher: tuple[str, ...] = LAUNCHER
) -> tuple[dict[int, str], str]:
    """Losses by iteration, as logged, and the whole output."""
    done = harness.torchrun(num_processes, *launcher, script, *FLAGS, *map(str, flags))
    assert done.returncode == 0, done.stdout[-3000:]
    logged = re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", done.stdout)
    return {int(iteration): loss for iteration, loss in logged}, done.stdout
