"""Megatron's pretraining of one model, which can wait for its turn on a GPU and measure the trained model at the end.

    torchrun --nproc_per_node 1 -m hgrn2_megatron benchmarks/quality/megatron_run.py [--turn FILE] [--measure DATA
        --lengths 2048 32768 --report FILE] [--hybrid-model] <Megatron's flags>

train.py starts it. With --turn, the run loads everything, and then waits until no other run holds the lock on FILE, so
that the next run starts up while this one trains. With --measure, it ends with the losses by position of the dataset
DATA, cut into sequences of each length. A length beyond the trained one shows how the model extrapolates.
"""

import argparse
import fcntl
import json
import sys
from pathlib import Path

import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.append(str(EXAMPLES))

import pretrain_gpt  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402

# numbers in a report's curve of losses by position, and tokens that go through the model at once
POINTS, TOKENS = 64, 32768


class Turn:
    """A lock on a file, held by the run whose turn it is on a GPU. It ends with the process at the latest."""

    def __init__(self, path: Path):
        self.file = open(path, "w")

    def take(self):
        print(f"waiting for the turn on {self.file.name}", flush=True)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        print("it is this run's turn", flush=True)

    def give(self):
        self.file.close()


def wait_after_setup(turn: Turn):
    """Make Megatron wait for its turn after the model and before the training."""
    provider = pretrain_gpt.datasets_provider

    def datasets_provider(*args, **options):
        datasets = provider(*args, **options)
        turn.take()
        return datasets

    pretrain_gpt.datasets_provider = datasets_provider


def keep_model() -> list[torch.nn.Module]:
    """Return a list that holds the model once training has begun."""
    kept: list[torch.nn.Module] = []
    step = pretrain_gpt.forward_step

    def forward_step(data_iterator, model):
        kept[:] = [model]
        return step(data_iterator, model)

    pretrain_gpt.forward_step = forward_step
    return kept


@torch.no_grad()
def losses_by_position(model: torch.nn.Module, dataset: IndexedDataset, length: int) -> dict:
    """Measure a model on a dataset whose documents follow each other, cut into sequences of one length.

    Args:
        model: gives losses [B, T] fp32 of tokens, positions, no mask and labels, each [B, T] int64.
        dataset: the documents; what is left after the last whole sequence does not count.
        length: tokens of a sequence, at least POINTS.

    Returns:
        "length", "sequences", "loss": the mean in nats per token, and "by_position": means over equal parts of the
        sequence, from its beginning to its end.

    Raises:
        ValueError: the dataset has fewer tokens than one sequence.
    """
    whole = torch.cat([torch.from_numpy(document.astype("int64")) for document in dataset[:]])
    count = (len(whole) - 1) // length
    if not count:
        raise ValueError(f"--lengths {length} is more than the {len(whole)} tokens of the dataset: give a shorter one")
    device = next(model.parameters()).device
    total = torch.zeros(length, dtype=torch.float64, device=device)
    for start in range(0, count, max(1, TOKENS // length)):
        size = min(max(1, TOKENS // length), count - start)
        piece = whole[start * length : (start + size) * length + 1].to(device)
        tokens, labels = piece[:-1].view(size, length), piece[1:].view(size, length)
        positions = torch.arange(length, device=device).expand(size, length)
        total += model(tokens, positions, None, labels=labels).double().sum(0)
    means = total / count
    return {
        "length": length,
        "sequences": count,
        "loss": means.mean().item(),
        "by_position": [round(part.mean().item(), 5) for part in means.chunk(POINTS)],
    }


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[])
    parser.add_argument("--report", type=Path)
    parser.add_argument("--hybrid-model", action="store_true")
    args, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    turn = Turn(args.turn) if args.turn else None
    if turn:
        wait_after_setup(turn)
    kept = keep_model()
    if args.hybrid_model:
        from megatron.training.argument_utils import hybrid_config_from_args

        pretrain_gpt.main(hybrid_config_from_args)
    else:
        pretrain_gpt.main()
    if args.measure and kept:
        (model,) = kept
        model.eval()
        dataset = IndexedDataset(str(args.measure))
        found = []
        for length in args.lengths:
            found.append(losses_by_position(model, dataset, length))
            print(f"sequences of {length}: {found[-1]['loss']:.5f} nats per token", flush=True)
            args.report.write_text(json.dumps(found, indent=1) + "\n")
    if turn:
        turn.give()


if __name__ == "__main__":
    main()
