"""Run Megatron's own training loop on small models through the launcher."""

import re
import subprocess
from pathlib import Path

import harness
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FLAGS = """
    --num-layers 2 --hidden-size 64 --hgrn2-expand-ratio 32 --num-attention-heads 2 --seq-length 64
    --max-position-embeddings 64 --mock-data --tokenizer-type NullTokenizer --vocab-size 127
    --make-vocab-size-divisible-by 64 --micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-3
    --log-interval 1 --eval-iters 1 --eval-interval 8 --logging-level 20
""".split()
# Without --logging-level, Megatron logs less where emerging-optimizers is installed.
if not torch.cuda.is_available():
    # on a machine with a GPU, this flag would leave the weights on the host
    FLAGS.append("--use-cpu-initialization")
OURS = "examples/pretrain_gpt.py"
HGRN2 = ("--spec", "hgrn2")
STACK = ("--spec", "hgrn2_megatron.spec", "hgrn2_stack")
ASYNC = ("--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "mcore")
LAUNCHER = ("-m", "hgrn2_megatron")


def launch(*flags, script: str = OURS, num_processes: int = 1, launcher=LAUNCHER) -> subprocess.CompletedProcess:
    """Start a run that may end in an error, and return it when it has ended."""
    return harness.torchrun(num_processes, *launcher, script, *FLAGS, *map(str, flags))


def train(*flags, **options) -> tuple[dict[int, str], str]:
    """Run without errors, and return the logged losses by iteration and the whole output.

    Args:
        flags: flags of the script.
        options: options of `launch`.
    """
    done = launch(*flags, **options)
    assert done.returncode == 0, done.stdout[-3000:]
    return losses_of(done.stdout), done.stdout


def losses_of(output: str) -> dict[int, str]:
    """Return the losses that Megatron logged, by iteration."""
    return {int(iteration): loss for iteration, loss in re.findall(r"iteration +(\d+)/.*?lm loss: (\S+)", output)}


def assert_continues(losses: dict[int, str], uninterrupted: dict[int, str], tolerance: float = 0):
    """Compare the losses of a run that resumed after iteration 4 with the losses of the uninterrupted run."""
    assert sorted(losses) == [i for i in sorted(uninterrupted) if i >= 5]
    # the second line that any Megatron run logs is the mean of its first two iterations
    for i in losses.keys() - {6}:
        assert abs(float(losses[i]) - float(uninterrupted[i])) <= tolerance, (losses, uninterrupted)


def saved_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint by its saved name, as a full tensor: weights and optimizer states."""
    reader = dcp.FileSystemReader(folder / f"iter_{iteration:07d}")
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Compare the tensors of two checkpoints bit for bit."""
    assert actual.keys() == expected.keys()
    assert [name for name, x in expected.items() if not torch.equal(actual[name], x)] == []
