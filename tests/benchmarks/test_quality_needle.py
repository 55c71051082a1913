"""Needles in bytes and state tracking: the sequences, and each benchmark as a whole on a toy model."""

import json
import sys
from pathlib import Path

import harness
import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
sys.path.append(str(FOLDER))

import needle  # noqa: E402
import needles  # noqa: E402
import results  # noqa: E402
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
    (tmp_path / "short").write_text("a" * 900)
    with pytest.raises(ValueError, match="gives 90 bytes of filler.* but --lengths has 96"):
        needle.check(needle.Needles(str(tmp_path / "short"), length=80, needles=1, lengths=(64, 96)))


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


class Reader:
    """Stand-in for a trained model, which keeps a needle for `memory` bytes and knows `known` bytes of its value."""

    def __init__(self, memory, known):
        self.memory, self.known = memory, known

    def right(self, batch):
        right = torch.zeros(batch.queries.shape, dtype=torch.bool)
        for row, queries, own in zip(batch.tokens.tolist(), batch.queries.tolist(), right, strict=True):
            query = queries[-2]
            distance = query - bytes(row).index(bytes(row[query : query + 3]))
            own[-2 : self.known - 2 or None] = distance <= self.memory
        return right


def test_needles_count_by_length_and_depth(tmp_path):
    (tmp_path / "text").write_bytes(bytes(TEXT.tolist()) * 2)
    task = needle.Needles(
        str(tmp_path / "text"), length=96, needles=3, key=1, value=2, lengths=(96, 384), depths=(0.0, 1.0), held_out=5
    )
    found = task.measure(Reader(memory=200, known=2))
    assert found["accuracy"] == {"96": {"0.0": 1.0, "1.0": 1.0}, "384": {"0.0": 0.0, "1.0": 1.0}}
    found = task.measure(Reader(memory=200, known=1))
    assert found["accuracy"]["96"] == {"0.0": 0.0, "1.0": 0.0}
    assert found["accuracy_of_bytes"] == {"96": {"0.0": 0.5, "1.0": 0.5}, "384": {"0.0": 0.0, "1.0": 0.5}}


def test_tables_show_the_best_rate_and_the_seeds():
    model = {"mixer": "HGRN2 64", "parameters": 1000}
    found = [(1e-3, 0.2), (1e-3, 0.4), (3e-3, 1.0), (3e-3, 0.8)]
    of_needles = [
        {"rate": rate, "accuracy": {"2048": {"0.0": share, "1.0": 1.0}, "4096": {"0.0": 0.0, "1.0": share}}}
        for rate, share in found
    ]
    rows = needle.rows({"models": [model | {"runs": of_needles}]})
    assert results.table(rows).splitlines()[2:] == [
        "| HGRN2 64 | 1,000 | 2 of 4 | 0.003 | 2,048 | 80.0 to 100.0 | 100.0 | 90.0 to 100.0 |",
        "| HGRN2 64 | 1,000 | 2 of 4 | 0.003 | 4,096 | 0.0 | 80.0 to 100.0 | 40.0 to 50.0 |",
    ]
    of_states = [
        {"machine": machine, "rate": rate, "accuracy": {"64": share if machine == "latch" else 0.5, "128": 0.5}}
        for machine in ("parity", "latch")
        for rate, share in found
    ]
    rows = state_tracking.rows({"settings": {"machines": ["latch", "parity"]}, "models": [model | {"runs": of_states}]})
    assert results.table(rows).splitlines()[2:] == [
        "| latch | 50.0 | HGRN2 64 | 1,000 | 0.003 | 80.0 to 100.0 | 50.0 |",
        "| parity | 50.0 | HGRN2 64 | 1,000 | 0.001 | 50.0 | 50.0 |",
    ]


ATTENTION = """
import small_models, torch
from kinds import Kind
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

small_models.start()
tokens = torch.randint(64, (2, 48))
for positions in (True, False):
    model = small_models.build(Kind("*", 128, 0, 2, positions), 64, 32, 1)
    own = model(tokens, None, None)
    for number, layer in enumerate(model.decoder.layers, 1):
        layer.self_attention.core_attention = DotProductAttention(model.config, number, AttnMaskType.causal, "self")
    torch.testing.assert_close(own, model(tokens, None, None))
# Without positions, the last token sees the same whatever the order of the others is. Only one layer has this property.
for positions in (True, False):
    model = small_models.build(Kind("*", 128, 0, 1, positions), 64, 32, 1)
    turned = torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)
    first, second = (model(x, None, None)[:, -1] for x in (tokens, turned))
    assert ((first - second).abs().max() > 1e-3) == positions
"""


def test_attention_is_megatrons_and_positions_can_be_left_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = harness.python("-c", f"import sys; sys.path.append({str(FOLDER)!r}){ATTENTION}")
    assert done.returncode == 0, done.stdout


def benchmark(out, program, *arguments):
    done = harness.python(str(FOLDER / program), "--tiny", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stdout
    (model,) = json.loads(out.read_text())["models"]
    return model, done.stdout


def test_a_toy_hybrid_trains_on_needles(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model, printed = benchmark(tmp_path / "out.json", "needle.py", "--models", "hybrid-without-positions")
    assert model["mixer"] == "hybrid HHH* 32 without positions"
    (run,) = model["runs"]
    # At first any byte can be the answer. Soon the model knows the 64 bytes of values, among which a guess costs 4.16.
    first, last = run["curve"]["64"][0], run["curve"]["64"][-1]
    assert first[1] > 5 and 3 < last[1] < 4.5 and last[0] == 40, run
    assert list(run["accuracy"]) == ["64", "128"] and "| depth 0% | depth 100% | mean |" in printed


def test_a_toy_model_follows_the_latch(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model, printed = benchmark(tmp_path / "out.json", "state_tracking.py", "--models", "hgrn2")
    (run,) = model["runs"]
    # Later tokens than those of the training are right too.
    assert run["machine"] == "latch" and min(run["accuracy"].values()) > 0.9, run
    assert "| tokens 1 to 16 | tokens 17 to 32 |" in printed
