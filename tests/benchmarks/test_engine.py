"""The benchmark of Megatron's dynamic engine as a whole, on a toy model."""

import re
from pathlib import Path

import harness

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "engine.py"


def test_every_row_is_measured(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = harness.python(str(SCRIPT), "--tiny")
    assert done.returncode == 0, done.stdout
    rows = re.findall(r"^\| no graph \| (\d+) \| [\d.]+ \| ([\d.]+) \| ([\d,]+) \|$", done.stdout, re.M)
    assert [int(length) for length, _, _ in rows] == [16, 48]
    for _, step, rate in rows:
        # two requests a step, as rounded
        assert abs(float(rate.replace(",", "")) * float(step) / 2000 - 1) < 0.01
