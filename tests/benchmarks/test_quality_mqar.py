"""Associative recall: the sequences, and the benchmark as a whole on a toy model."""

import json
import sys
from pathlib import Path

import harness
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.append(str(FOLDER))

import mqar_results  # noqa: E402
import recall  # noqa: E402
import results  # noqa: E402


def draw(size, count=500, vocab=8192, seed=0):
    return recall.sequences(size, count, vocab, torch.Generator().manual_seed(seed))


def test_a_sequence_has_each_pair_and_later_each_key():
    size = recall.Size(64, 8)
    batch = draw(size)
    tokens, context = batch.tokens, 16
    keys, values = tokens[:, 0:context:2], tokens[:, 1:context:2]
    assert ((keys >= 1) & (keys < 4096)).all() and ((values >= 4096) & (values < 8192)).all()
    for row in (keys, values, batch.queries):
        assert all(len(set(numbers)) == 8 for numbers in row.tolist())
    # a query is followed by the place of its answer, which the model has to give at the query already
    assert torch.equal(tokens.gather(1, batch.queries), keys) and torch.equal(batch.answers, values)
    assert (batch.queries >= context).all() and (batch.queries % 2 == 0).all()
    assert (tokens[:, context:] != 0).sum() == 500 * 8


def test_gaps_follow_the_power_law():
    # one query at a time, of 30 places: the first is drawn with 1 / sum of i^-0.99
    gaps = (draw(recall.Size(62, 1), count=20000).queries[:, 0] - 2) // 2
    weights = torch.arange(1, 31) ** (recall.POWER - 1)
    expected = weights / weights.sum()
    found = torch.bincount(gaps, minlength=30) / 20000
    assert (found - expected).abs().max() < 0.012
    # the first key is asked sooner than the last
    queries = draw(recall.Size(256, 16)).queries.double().mean(0)
    assert queries[0] < 0.8 * queries[-1]


def test_the_same_seed_gives_the_same_sequences():
    size = recall.Size(32, 4)
    assert torch.equal(draw(size, seed=3).tokens, draw(size, seed=3).tokens)
    assert not torch.equal(draw(size, seed=3).tokens, draw(size, seed=4).tokens)


@pytest.mark.parametrize(("length", "pairs"), [(31, 4), (15, 4), (14, 4)])
def test_too_short_sequences_are_refused(length, pairs):
    with pytest.raises(ValueError, match="at least 16"):
        recall.Size(length, pairs)


def test_too_few_keys_are_refused():
    with pytest.raises(ValueError, match="7 keys"):
        draw(recall.Size(64, 8), vocab=16)


def test_a_toy_hybrid_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "mqar.json"
    command = [str(FOLDER / "mqar.py"), "--tiny", "--patterns", "H*", "--expand-ratios", "32", "--out", str(out)]
    done = harness.python(*command, "--widths", "32")
    assert done.returncode == 0, done.stdout
    (model,) = json.loads(out.read_text())["models"]
    assert (model["mixer"], model["state"]) == ("hybrid H* 32", 32 * 32)
    (run,) = model["runs"]
    # whoever knows the values of a sequence, and not which is asked for, gets 1 of 2 and 1 of 4
    assert run["accuracy"]["2"] > 0.9 and run["accuracy"]["4"] > 0.9, run
    first, last = run["curve"]["4"][0], run["curve"]["4"][-1]
    assert first[0] == 8 and last[0] == 160 and first[1] > 2.5 > 0.5 > last[1]
    # what is done is not done again
    again = harness.python(*command, "--widths", "32")
    assert again.returncode == 0 and "width 32, hybrid H* 32:" not in again.stdout
    other = harness.python(*command, "--widths", "32", "--steps", "8")
    assert other.returncode and "other settings" in other.stdout


def test_a_table_shows_the_best_rate_the_seeds_and_how_many_runs_learned():
    found = [(1e-3, 0.26, 0.01), (1e-3, 1.0, 0.5), (3e-3, 1.0, 0.7), (3e-3, 1.0, 0.8)]
    runs = [{"rate": rate, "accuracy": {"4": four, "64": many}} for rate, four, many in found]
    model = {"width": 64, "mixer": "HGRN2 32", "without_embeddings": 1000, "state": 4096, "seconds": 9.0, "runs": runs}
    rows = mqar_results.rows({"settings": {"sizes": [[64, 4], [512, 64]]}, "models": [model]})
    row = results.table(rows).splitlines()[-1]
    assert row == "| 64 | HGRN2 32 | 1,000 | 4,096 | 3 of 4 | 0.003 | 100.0 | 70.0 to 80.0 | 9 |"
