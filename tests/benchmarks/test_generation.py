"""The decoding benchmark as a whole, on a toy model."""

import json
from pathlib import Path

import harness

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generation.py"


def test_every_row_is_measured(tmp_path, monkeypatch):
    # a GPU would run in bf16, with other sizes of states
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    figures = tmp_path / "figures.json"
    done = harness.python(str(SCRIPT), "--tiny", "--out", str(figures))
    assert done.returncode == 0, done.stdout
    rows = json.loads(figures.read_text())
    assert [row["way"] for row in rows["prefill"]] == ["HGRN2", "attention"]
    pure, attention = (
        {
            row["context"]: row["states or cache MiB"]
            for row in rows["rows"]
            if row["model"] == model and "note" not in row
        }
        for model in ("HGRN2", "attention")
    )
    # a state of 4 heads of 16 x 16 in fp32 per layer and sequence, whatever the length; keys and values of each token
    assert list(pure.values()) == [round(2 * 2 * 4 * 16 * 16 * 4 / 2**20, 3)] * 2
    assert attention == {length: round(2 * 2 * 2 * (length + 8) * 64 * 4 / 2**20, 3) for length in (16, 48)}
    batches = {row["model"]: row["batch"] for row in rows["rows"] if "note" in row}
    assert batches["HGRN2"] == 8 and batches["attention"] == 4
