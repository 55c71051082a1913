"""Needles in bytes and state tracking: the sequences, and each benchmark as a whole on a toy model."""

import json
import sys
from pathlib import Path

import harness
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.append(str(FOLDER))

import needles  # noqa: E402
import state_tracking  # noqa: E402

TEXT = torch.frombuffer(bytearray(b"".join(b"%05d " % number for number in range(400))), dtype=torch.uint8)
LAYOUT = needles.Layout(length=200, needles=4, key=2, value=4)
LINE, FILLER = 10, 120


def draw(depth=None, count=300, layout=LAYOUT):
    batch = needles.sequences(layout, count, TEXT, torch.Generator().manual_seed(0), depth)
    return batch, [bytes(row.tolist()) for row in batch.tokens]


def test_a_sequence_is_filler_with_needles_and_their_questions():
    batch, sequences = draw()
    assert batch.tokens.shape == (300, 200)
    for data, queries, answers in zip(sequences, batch.queries.tolist(), batch.answers.tolist(), strict=True):
        filler, keys = data, set()
        for number in range(4):
            own = slice(4 * number, 4 * number + 4)
            first = queries[own][0]
            # Each byte of the value is asked for at the byte before it.
            assert queries[own] == list(range(first, first + 4))
            line = data[first - 3 : first + 7]
            assert line[:2] == b"\n[" and line[-2:] == b"]\n" and bytes(answers[own]) == line[4:8]
            assert all(128 <= byte < 192 for byte in line[2:4]) and all(byte >= 192 for byte in line[4:8])
            # The needle comes before its question.
            assert data.count(line) == 2 and data.index(line) < first - 3
            filler = filler.replace(line, b"")
            keys.add(line[2])
        assert len(keys) == 4 and data.endswith(line)
        # What is left is one stretch of the text.
        assert len(filler) == FILLER and filler in bytes(TEXT.tolist())


@pytest.mark.parametrize(("depth", "before"), [(0.0, 0), (0.5, 60), (1.0, 120)])
def test_the_last_question_asks_for_the_needle_at_the_depth(depth, before):
    for data in draw(depth)[1]:
        place = data.index(data[-LINE:])
        assert sum(byte < 128 and byte not in b"\n[]" for byte in data[:place]) == before
    places = [data.index(data[-LINE:]) for data in draw()[1]]
    assert min(places) < 20 and max(places) > 150 and len(set(places)) > 50


def test_half_of_the_other_questions_are_near():
    batch, sequences = draw()
    pairs = [
        (data.index(data[query - 3 : query + 7]), query - 3)
        for data, queries in zip(sequences, batch.queries[:, 0:12:4].tolist(), strict=True)
        for query in queries
    ]
    gaps = torch.tensor([question - needle - LINE for needle, question in pairs])
    # An even spread from 0 to what is left has 15% of its gaps below 5 bytes, and the even logarithm 46%.
    assert 0.2 < (gaps < 5).double().mean() < 0.4 and gaps.max() > 100


def test_the_last_of_the_text_is_held_out(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.py").write_text(f"{number}" * 10)
    (tmp_path / "dist-packages").mkdir()
    (tmp_path / "dist-packages" / "x.py").write_text("x")
    train, held_out = ({chr(x) for x in text.tolist()} for text in needles.read(tmp_path, 1000))
    assert len(train) == 9 and len(held_out) == 1 and not train & held_out and "x" not in train | held_out
    train, held_out = needles.read(tmp_path / "1.py", 1000)
    assert (len(train), len(held_out)) == (9, 1)


def test_too_little_text_and_too_short_sequences_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give at least 61"):
        needles.Layout(length=60, needles=3, key=2, value=4)
    with pytest.raises(ValueError, match="at most 64"):
        needles.Layout(length=6000, needles=65, key=2, value=4)
    with pytest.raises(ValueError, match="longer one"):
        draw(layout=needles.Layout(length=4000, needles=1, key=2, value=4))
    (tmp_path / "short").write_text("a")
    with pytest.raises(ValueError, match="too little text"):
        needles.read(tmp_path / "short", 1000)


@pytest.mark.parametrize("machine", state_tracking.MACHINES)
def test_states_are_those_of_a_machine_that_runs_token_by_token(machine):
    table = state_tracking.MACHINES[machine]
    batch = state_tracking.sequences(machine, 20, 45, torch.Generator().manual_seed(0))
    for row, answers in zip(batch.tokens.tolist(), batch.answers.tolist(), strict=True):
        state = 0
        for token, answer in zip(row, answers, strict=True):
            state = table[state][token]
            assert answer == len(table[0]) + state
    assert len(set(batch.answers.flatten().tolist())) == len(table)


def test_the_machines_are_what_they_are_called():
    parity, s3 = state_tracking.MACHINES["parity"], state_tracking.MACHINES["s3"]
    ones = torch.tensor([[1, 1, 0, 1, 0]])
    assert state_tracking.states("parity", ones).tolist() == [[1, 0, 0, 1, 1]] and parity == [[0, 1], [1, 0]]
    # A group: each token moves the states to other places, and the order of tokens matters.
    for moves in (torch.tensor(s3), torch.tensor(s3).t()):
        assert all(sorted(row) == list(range(6)) for row in moves.tolist())
    assert s3[1][2] != s3[2][1]


def benchmark(out, program, *arguments):
    done = harness.python(str(FOLDER / program), "--tiny", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stdout
    (model,) = json.loads(out.read_text())["models"]
    return model, done.stdout


def test_a_toy_hybrid_finds_needles(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model, printed = benchmark(tmp_path / "out.json", "needle.py", "--models", "hybrid-without-positions")
    assert model["mixer"] == "hybrid HHH* 32 without positions"
    (run,) = model["runs"]
    print(run)
    # A guess is right in 1 of 64.
    assert min(run["accuracy"]["64"].values()) > 0.5, run
    assert list(run["accuracy"]) == ["64", "128"] and "| depth 0% | depth 100% | mean |" in printed


def test_a_toy_model_follows_the_latch(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model, printed = benchmark(tmp_path / "out.json", "state_tracking.py", "--models", "hgrn2")
    (run,) = model["runs"]
    assert run["machine"] == "latch" and min(run["accuracy"].values()) > 0.9, run
    assert "| tokens 1 to 16 | tokens 17 to 32 |" in printed
