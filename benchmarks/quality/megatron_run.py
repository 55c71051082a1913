"""Run Megatron's pretraining of one model with a fast held-out loss, and measure the trained model at the end.

    torchrun --nproc_per_node 1 -m hgrn2_megatron benchmarks/quality/megatron_run.py --held-out DATA [--turn FILE]
        [--measure DATA --lengths 2048 32768 --report FILE] [--hybrid-model | --fla] <Megatron's flags>

train.py starts this program. At each of Megatron's evaluations, it measures the loss on the whole dataset of
--held-out once. Megatron's own --full-validation feeds one sequence per micro-batch, and its every step takes a batch
of them, so it would read the dataset as often as a batch has micro-batches. That took 53 seconds on one H200 where
545 sequences of 2,048 tokens were held out.

With --turn, the run loads everything and then waits until no other run holds the lock on FILE. So the next run starts
up while this one trains. With --measure, the run ends with the losses by position on the dataset DATA, in sequences of
each length. A length beyond the trained one shows how the model extrapolates. There are two kinds of sequences. The
first joins all documents and cuts them, so most of its sequences have several documents. The second takes the
beginnings of the documents that alone fill a sequence. The strength of the gates of HGRN2 layers then goes to
gates.json beside FILE (gate_strength.py). With --fla, fla's model trains in the place of Megatron's (fla_twin.py).
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


def read_documents(dataset: Path) -> list[Tensor]:
    """Return the documents of an indexed dataset, each [tokens] int64."""
    # its documents are views of a file that is mapped while it lives
    documents = IndexedDataset(str(dataset))
    return [torch.from_numpy(document.astype("int64")) for document in documents[:]]


def joined(documents: list[Tensor], length: int) -> Tensor:
    """Join documents, and cut them into sequences that begin with the last token of the one before.

    Returns:
        [sequences, length + 1] int64. The tokens after the last whole sequence are left out.

    Raises:
        ValueError: there are fewer tokens than one sequence needs.
    """
    whole = torch.cat(documents)
    if len(whole) <= length:
        raise ValueError(
            f"sequences of {length} do not fit into a dataset of {len(whole)} tokens: give a shorter length"
        )
    return whole.unfold(0, length + 1, length)


def beginnings(documents: list[Tensor], length: int) -> Tensor:
    """Return the first tokens of each document that has more than `length`, [sequences, length + 1] int64."""
    found = [document[: length + 1] for document in documents if len(document) > length]
    return torch.stack(found) if found else torch.empty(0, length + 1, dtype=torch.int64)


def measure_held_out(dataset: Path) -> list[torch.nn.Module]:
    """Make each of Megatron's evaluations one pass over a dataset, and return a list that then holds the model."""
    documents, kept, measured = read_documents(dataset), [], set()

    def evaluate(prefix, forward_step, data_iterator, model, iteration, *rest, **options):
        kept[:] = model
        # Megatron evaluates once more when the training ends.
        if iteration in measured:
            return
        measured.add(iteration)
        found = losses_by_position(model[0], joined(documents, get_args().seq_length))
        print(f" validation loss at iteration {iteration} | lm loss value: {found['loss']:.6E} |", flush=True)

    training.evaluate_and_print_results = evaluate
    return kept


@torch.no_grad()
def losses_by_position(model: torch.nn.Module, sequences: Tensor) -> dict:
    """Measure a model on sequences of one length.

    Args:
        model: gives losses [B, T] fp32 of tokens, positions, no mask and labels, each [B, T] int64. It is in training
            mode afterwards.
        sequences: [sequences, T + 1] int64 with at least one sequence and T >= POINTS. The first token of a sequence
            is no label, and the last one is no input.

    Returns:
        "sequences": how many there were, "loss": the mean in nats per token, and "by_position": means over equal parts
        of the sequence, from its beginning to its end.
    """
    count, length = len(sequences), sequences.shape[1] - 1
    model.eval()
    inputs, labels = sequences[:, :-1], sequences[:, 1:]
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
        "sequences": count,
        "loss": means.mean().item(),
        "by_position": [round(part.mean().item(), 5) for part in means.chunk(POINTS)],
    }


def by_length(model: torch.nn.Module, documents: list[Tensor], length: int) -> dict:
    """Return what `losses_by_position` finds in all documents, joined, with "length" and "long_documents".

    "long_documents" is what it finds in the beginnings of those documents that have more than `length` tokens. It is
    missing if there are none.

    Raises:
        ValueError: there are fewer tokens than one sequence needs.
    """
    found = {"length": length} | losses_by_position(model, joined(documents, length))
    long = beginnings(documents, length)
    return found | {"long_documents": losses_by_position(model, long)} if len(long) else found


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
        found, documents = [], read_documents(args.measure)
        for length in args.lengths:
            found.append(by_length(kept[0], documents, length))
            print(f"sequences of {length}: {found[-1]['loss']:.5f} nats per token", flush=True)
            args.report.write_text(json.dumps(found, indent=1) + "\n")
        length = get_args().seq_length
        some = joined(documents, length)[: max(1, TOKENS // length)]
        layers = gate_strength.of_layers(lambda: losses_by_position(kept[0], some))
        if layers:
            args.report.with_name("gates.json").write_text(json.dumps(layers, indent=1) + "\n")
    if turn:
        turn.give()


if __name__ == "__main__":
    main()
