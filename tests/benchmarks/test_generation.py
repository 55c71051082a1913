"""The decoding benchmark as a whole, on a toy model."""

import json
from pathlib import Path

import harness

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"


def test_every_row_is_measured(tmp_path, monkeypatch):
    # which makes other figures
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    figures = tmp_path / "figures.json"
    done = harness.python(str(SCRIPT), "--tiny", "--json", str(figures))
    assert done.returncode == 0, done.stdout
    rows = json.loads(figures.read_text())
    assert [row["way"] for row in rows["prefill"]] == ["HGRN2", "attention"]
    pure = {row["context"]: row for row in rows["decode"] if row["way"] == "HGRN2" and "largest" not in row}
    attention = {row["context"]: row for row in rows["decode"] if row["way"] == "attention" and "largest" not in row}
    # a state of 4 heads of 16 x 16 in fp32 a layer and sequence, whatever the length; keys and values of each token
    assert [row["bytes"] for row in pure.values()] == [2 * 2 * 4 * 16 * 16 * 4] * 2
    assert [row["bytes"] for row in attention.values()] == [2 * 2 * 2 * (length + 8) * 64 * 4 for length in attention]
    batches = {row["way"]: row["batch"] for row in rows["decode"] if "largest" in row}
    assert batches["HGRN2"] == 8 and batches["attention"] == 4
