"""The losses by position that megatron_run.py measures, with a model whose loss is the number of the token."""

import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def megatron_run():
    sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "quality"))
    import megatron_run

    return megatron_run


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def forward(self, tokens, positions, mask, labels):
        assert mask is None and not self.training and torch.equal(positions[0], torch.arange(tokens.shape[1]))
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        self.seen.append(labels)
        return labels.float()


def test_a_held_out_loss_is_that_of_one_pass(megatron_run):
    model, tokens = Model(), torch.arange(40 * 1024 + 700)
    found = megatron_run.losses_by_position(model, megatron_run.joined([tokens[:9], tokens[9:]], 1024))
    assert found["sequences"] == 40 and found["loss"] == (1 + 40 * 1024) / 2 and model.training
    # two batches of one shape, of which the second repeats its last sequence
    assert [labels.shape for labels in model.seen] == [(32, 1024), (32, 1024)]
    assert torch.equal(torch.cat(model.seen)[:40].flatten(), tokens[1 : 40 * 1024 + 1])
    # the first of the 64 parts is 16 positions, of 40 sequences
    assert found["by_position"][0] == 8.5 + 1024 * 39 / 2
    with pytest.raises(ValueError, match="sequences of 1024"):
        megatron_run.joined([tokens[:1024]], 1024)


def test_the_beginnings_of_long_documents_are_measured_alone(megatron_run):
    documents = [torch.arange(start, start + size) for start, size in ((0, 65), (1000, 64), (5000, 300))]
    assert megatron_run.beginnings(documents, 64).tolist() == [list(range(65)), list(range(5000, 5065))]
    found = megatron_run.by_length(Model(), documents, 64)
    # all documents have 429 tokens, which are 6 sequences and their last labels
    assert found["length"] == 64 and found["sequences"] == 6
    assert found["long_documents"]["sequences"] == 2 and found["long_documents"]["loss"] == 32.5 + 2500
    assert "long_documents" not in megatron_run.by_length(Model(), documents, 300)
