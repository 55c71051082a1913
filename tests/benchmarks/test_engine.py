"""The benchmark of Megatron's dynamic engine as a whole, on a toy model."""

import json
import re
from pathlib import Path

import harness

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine.py"


def test_every_row_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = harness.python(str(SCRIPT), "--tiny", "--out", str(tmp_path / "engine.json"))
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^\| no graph \| (\d+) \| [\d.]+ \| ([\d.]+) \| ([\d,]+) \|$", done.stdout, re.M)
    assert [int(length) for length, _, _ in rows] == [16, 48]
    for _, step, rate in rows:
        # two requests per step; both numbers are rounded
        assert abs(float(rate.replace(",", "")) * float(step) / 2000 - 1) < 0.01
    results = json.loads((tmp_path / "engine.json").read_text())
    assert [(row["way"], row["context"]) for row in results["rows"]] == [("no graph", 16), ("no graph", 48)]
    assert [row["ms per step"] for row in results["rows"]] == [float(step) for _, step, _ in rows]
