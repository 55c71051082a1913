"""HGRN2 trained here and in fla from the same weights on the same batches."""

import json
import sys
from pathlib import Path

import harness
import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "quality"
VOCAB, USED, ITERATIONS = 64, 8, 5


def beside_fla():
    sys.path.append(str(FOLDER))
    import beside_fla

    return beside_fla


def write_data(folder: Path):
    """Write the datasets of tokens.py, with random tokens out of an eighth of the vocabulary."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder, get_bin_path, get_idx_path

    about = {"vocab": VOCAB}
    for name, count in (("train", 400), ("heldout", 33), ("heldout-sample", 33)):
        tokens = np.random.default_rng(count).integers(USED, size=count, dtype=np.uint16)
        builder = IndexedDatasetBuilder(get_bin_path(str(folder / name)), dtype=np.uint16)
        builder.add_document(tokens, [count])
        builder.finalize(get_idx_path(str(folder / name)))
        about[name] = {"documents": 1, "bytes": count, "tokens": count}
    (folder / "data.json").write_text(json.dumps(about))


def test_fla_and_megatron_train_alike(tmp_path):
    pytest.importorskip("fla", reason="needs fla: pip install flash-linear-attention==0.6.0")
    write_data(tmp_path)
    figures = tmp_path / "figures.json"
    # No GPU is named, because a GPU would tune fla's kernels for minutes.
    words = f"--data {tmp_path} --out {tmp_path}/runs --json {figures} --size toy --lr 1e-2 --gpus".split()
    words += ["", "--iterations", str(ITERATIONS), "--every", "1"]
    # the runs may be trained one by one, and the last call compares them
    for runs, missing in (["noise"], "ours and fla"), (["fla", "ours"], ""):
        done = harness.python(str(FOLDER / "beside_fla.py"), *words, "--runs", *runs)
        assert done.returncode == 0, done.stdout[-3000:]
        assert figures.exists() == (not missing)
        assert not missing or f"train {missing} too" in done.stdout
    found = json.loads(figures.read_text())
    losses, about = found["losses"], found["verdict"]
    assert [len(losses[name]) for name in ("ours", "noise", "fla")] == [ITERATIONS] * 3
    assert [row["run"] for row in found["rows"]] == ["ours", "noise", "fla"]
    assert len({row["parameters"] for row in found["rows"]}) == 1 and found["rows"][2]["tokens/s"] > 0
    assert [line["iterations"] for line in found["tenths"]] == [f"{i} to {i}" for i in range(1, ITERATIONS + 1)]
    assert found["tenths"][-1]["fla"] == f"{losses['fla'][-1]:.4f}"
    # The model learns something, and both sides learn the same.
    assert losses["ours"][-1] < losses["ours"][0] - 0.2
    assert about["fla from ours"]["first"] <= 2e-6 and about["fla from ours"]["largest"] < 5e-5
    assert about["noise from ours"]["largest"] < 5e-5


def test_the_verdict_takes_the_mean_and_the_largest_distance():
    ours = dict(enumerate([3.0, 2.0, 1.0, 1.0], 1))

    def verdict(noise, fla):
        runs = {"ours": ours} | {name: {i: ours[i] + x for i, x in by.items()} for name, by in (noise, fla)}
        return beside_fla().verdict(runs)

    noise = ("noise", {1: 0.0, 2: 0.01, 3: -0.01, 4: 0.02})
    found = verdict(noise, ("fla", {1: 0.001, 2: -0.02, 3: 0.03, 4: 0.01}))
    assert found["within noise"]
    assert found["fla from ours"] == pytest.approx({"first": 0.001, "mean": 0.01525, "largest": 0.03, "above": 0.02})
    assert not verdict(noise, ("fla", {1: 0, 2: 0, 3: 0, 4: 0.05}))["within noise"]
    assert not verdict(noise, ("fla", {1: 0.025, 2: 0.025, 3: 0.025, 4: 0.025}))["within noise"]
    # Runs that are equal up to the digits of the log are within the noise.
    assert verdict(("noise", dict.fromkeys(ours, 0.0)), ("fla", dict.fromkeys(ours, 1e-6)))["within noise"]
    halves = beside_fla().tenths({"ours": {i: float(i) for i in range(1, 21)}})
    assert halves[0] == {"iterations": "1 to 2", "ours": "1.5000"}
    assert halves[-1] == {"iterations": "19 to 20", "ours": "19.5000"}
    with pytest.raises(ValueError, match="different iterations, {'ours': 4, 'noise': 4, 'fla': 3}"):
        verdict(noise, ("fla", {1: 0.0, 2: 0.0, 3: 0.0}))


def test_a_machine_without_fla_is_refused_before_any_run(monkeypatch):
    beside = beside_fla()
    monkeypatch.setitem(sys.modules, "fla", None)
    for model in ("hgrn2", "attention"):
        beside.check_packages(model)
    with pytest.raises(ValueError, match="hgrn2-fla needs fla, which is missing"):
        beside.check_packages("hgrn2-fla")
