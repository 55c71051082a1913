"""Run Megatron's pretraining of one model with a fast held-out loss, and measure the trained model at the end.

    torchrun --nproc_per_node 1 -m hgrn2_megatron benchmarks/quality/megatron_run.py --held-out DATA [--turn FILE]
        [--measure DATA --lengths 2048 32768 --report FILE] [--hybrid-model | --fla] <Megatron's flags>

train.py starts this program. At each of Megatron's evaluations, it measures the loss on the whole dataset of
--held-out once. Megatron's own --full-validation feeds one sequence per micro-batch, and its every step takes a batch
of them, so it would read the dataset as often as a batch has micro-batches. That took 53 seconds on one H200 where
545 sequences of 2,048 tokens were held out.

With --turn, the run loads everything and then waits until no other run holds the lock on FILE. So the next run starts
up while this one trains. With --measure, the run ends with the losses by position on the dataset DATA, which is cut
into sequences of each length. A length beyond the trained one shows how the model extrapolates. The strength of the
gates of HGRN2 layers then goes to gates.json beside FILE (gate_strength.py). With --fla, fla's model trains in the
place of Megatron's (fla_twin.py).
"""

import argparse
import fcntl
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

import gate_strength  # noqa: E402
import pretrain_gpt  # noqa: E402
from megatron.core.datasets.indexed_dataset import IndexedDataset  # noqa: E402
from megatron.training import get_args, training  # noqa: E402
from torch import Tensor  # noqa: E402

# A report has this many numbers in its curve of losses by position.
POINTS = 64
# This many tokens go through the model at once.
TOKENS = 32768


class Turn:
    """A lock on a file that the run holds whose turn it is on a GPU. The lock ends with its process at the latest."""

    def __init__(self, path: Path):
        self.file = open(path, "w")

    def take(self):
        """Wait until no other process holds the lock, and take it."""
        print(f"waiting for the turn on {self.file.name}", flush=True)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        print("it is this run's turn", flush=True)

    def give(self):
        """Give the lock back."""
        self.file.close()


def wait_after_setup(turn: Turn):
    """Make Megatron wait for its turn when the model is built and before the training begins."""
    provider = pretrain_gpt.datasets_provider

    def datasets_provider(*args, **options):
        datasets = provider(*args, **options)
        turn.take()
        return datasets

    pretrain_gpt.datasets_provider = datasets_provider


def read_tokens(dataset: Path) -> Tensor:
    """Return the documents of an indexed dataset one after the other, [tokens] int64."""
    documents = IndexedDataset(str(dataset))
    return torch.cat([torch.from_numpy(document.astype("int64")) for document in documents[:]])


def measure_held_out(dataset: Path) -> list[torch.nn.Module]:
    """Make each of Megatron's evaluations one pass over a dataset, and return a list that then holds the model."""
    tokens, kept, measured = read_tokens(dataset), [], set()

    def evaluate(prefix, forward_step, data_iterator, model, iteration, *rest, **options):
        kept[:] = model
        # Megatron evaluates once more when the training ends.
        if iteration in measured:
            return
        measured.add(iteration)
        found = losses_by_position(model[0], tokens, get_args().seq_length)
        print(f" validation loss at iteration {iteration} | lm loss value: {found['loss']:.6E} |", flush=True)

    training.evaluate_and_print_results = evaluate
    return kept


@torch.no_grad()
def losses_by_position(model: torch.nn.Module, whole: Tensor, length: int) -> dict:
    """Measure a model on tokens that are cut into sequences of one length.

    Args:
        model: gives losses [B, T] fp32 of tokens, positions, no mask and labels, each [B, T] int64. It is in training
            mode afterwards.
        whole: [tokens] int64. The tokens after the last whole sequence do not count.
        length: tokens of a sequence, at least POINTS.

    Returns:
        "length", "sequences", "loss": the mean in nats per token, and "by_position": means over equal parts of the
        sequence, from its beginning to its end.

    Raises:
        ValueError: there are fewer tokens than one sequence needs.
    """
    count = (len(whole) - 1) // length
    if not count:
        raise ValueError(
            f"sequences of {length} do not fit into a dataset of {len(whole)} tokens: give a shorter length"
        )
    model.eval()
    inputs, labels = whole[: count * length].view(count, length), whole[1 : count * length + 1].view(count, length)
    device, batch = next(model.parameters()).device, min(count, max(1, TOKENS // length))
    positions = torch.arange(length, device=device).expand(batch, length)
    total = torch.zeros(length, dtype=torch.float64, device=device)
    for start in range(0, count, batch):
        # The last batch repeats its last sequence, because another shape would compile Megatron's functions again.
        rows = torch.arange(start, start + batch).clamp(max=count - 1)
        losses = model(inputs[rows].to(device), positions, None, labels=labels[rows].to(device))
        total += losses[: count - start].double().sum(0)
    model.train()
    means = total / count
    return {
        "length": length,
        "sequences": count,
        "loss": means.mean().item(),
        "by_position": [round(part.mean().item(), 5) for part in means.chunk(POINTS)],
    }


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--turn", type=Path)
    parser.add_argument("--measure", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[])
    parser.add_argument("--report", type=Path)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--hybrid-model", action="store_true")
    form.add_argument("--fla", action="store_true")
    args, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    turn = Turn(args.turn) if args.turn else None
    if turn:
        wait_after_setup(turn)
    kept = measure_held_out(args.held_out)
    if args.hybrid_model:
        from megatron.training.argument_utils import hybrid_config_from_args

        pretrain_gpt.main(hybrid_config_from_args)
    elif args.fla:
        from fla_twin import with_twin
        from megatron.training.argument_utils import gpt_config_from_args

        pretrain_gpt.main(lambda args: with_twin(gpt_config_from_args(args)))
    else:
        pretrain_gpt.main()
    if args.measure and kept:
        found, tokens = [], read_tokens(args.measure)
        for length in args.lengths:
            found.append(losses_by_position(kept[0], tokens, length))
            print(f"sequences of {length}: {found[-1]['loss']:.5f} nats per token", flush=True)
            args.report.write_text(json.dumps(found, indent=1) + "\n")
        layers = gate_strength.of_layers(
            lambda: losses_by_position(kept[0], tokens[: TOKENS + 1], get_args().seq_length)
        )
        if layers:
            args.report.with_name("gates.json").write_text(json.dumps(layers, indent=1) + "\n")
    if turn:
        turn.give()


if __name__ == "__main__":
    main()
