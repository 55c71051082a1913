"""The benchmark of fla's model before and after for_fla and beside ours, on a toy model."""

import json
from pathlib import Path

import harness
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fla_model.py"


def test_every_row_is_checked_and_measured(tmp_path, monkeypatch):
    pytest.importorskip("fla", reason="needs fla: pip install flash-linear-attention==0.6.0")
    # a GPU would tune fla's kernels for minutes
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    figures = tmp_path / "figures.json"
    done = harness.python(str(SCRIPT), "--tiny", "--out", str(figures))
    assert done.returncode == 0, done.stdout
    found = json.loads(figures.read_text())
    # fla is compared with itself; the other two round in another order
    errors = found["errors"]
    assert errors["fla"] == 0 and 0 < errors["with the operator"] < 1e-5 and 0 < errors["hgrn2_kernels.hf"] < 1e-5
    runs = ["training step, 2 x 9", "prefill, 2 x 9", "decoding, batch 2"]
    models = ["fla", "with the operator", "fla, restored", "hgrn2_kernels.hf"]
    assert [(row["run"], row["model"]) for row in found["rows"]] == [(run, model) for run in runs for model in models]
    assert all(row["ms"] > 0 for row in found["rows"])
    done = harness.python(str(SCRIPT), "--tiny", "--models", "hgrn2_kernels.hf", "fla", "--out", str(figures))
    assert done.returncode == 0, done.stdout
    rows = json.loads(figures.read_text())["rows"]
    assert [row["model"] for row in rows] == 3 * ["fla", "hgrn2_kernels.hf"]
    assert all((row["times as fast"] == 1) == (row["model"] == "fla") for row in rows)
