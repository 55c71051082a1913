"""Batches that context parallel ranks share, without gradients and with, by all that says how they are dealt out."""

import harness
import pytest


@pytest.mark.parametrize("cp", [2, 4])
def test_every_batch_is_what_it_is_on_one_rank(cp):
    done = harness.torchrun(cp, "tests/parallel/inference.py")
    assert done.returncode == 0, done.stdout[-4000:]
    # unpacked in two modes, packed in each layout with two modes in turn, and four cases more
    assert done.stdout.count("same: ") == 2 + 2 * 7 + 4, done.stdout[-4000:]
