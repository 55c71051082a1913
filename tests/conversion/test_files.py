"""The files of both sides: several with an index, tensors that do not fit, and files that are cut off or missing."""

import json
import shutil

import pytest
import torch
from conversion_cases import CONFIG, HIDDEN, assert_refused, convert, hf_weights, read_hf, write_hf
from safetensors.torch import load_file
from training import assert_equal


def test_small_files_have_an_index(tmp_path):
    source = write_hf(tmp_path / "hf")
    back = convert(convert(source, tmp_path / "megatron"), tmp_path / "back", "--max-shard-size", 1e-4)
    where = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name: set(load_file(file)) for file in back.glob("*.safetensors")}
    assert len(files) > 1 and where == {name: file for file, names in files.items() for name in names}
    again = convert(convert(back, tmp_path / "again"), tmp_path / "whole")
    assert_equal(read_hf(again), read_hf(source))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), "model.layers.2.mlp.up_proj.weight is missing"),
        (lambda w: w.update({"model.layers.7.extra": torch.ones(2)}), "model.layers.7.extra has no place"),
        (lambda w: w.update({"scale": torch.tensor(1.0)}), "scale has no place"),
        (
            lambda w: w.update({"model.lower_bounds": torch.ones(4, HIDDEN)}),
            r"model.lower_bounds has shape \(4, 64\), but its config requires \(3, 64\)",
        ),
        (lambda w: w.update({"model.norm.weight": torch.ones(HIDDEN).long()}), "model.norm.weight has dtype I64"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, files, tmp_path):
    weights = hf_weights(CONFIG)
    change(weights)
    assert_refused(message, write_hf(tmp_path / "hf", weights, files), tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-8]), lambda file: file.unlink()])
def test_a_file_that_is_cut_off_or_missing(damage, tmp_path):
    source = write_hf(tmp_path / "hf", files=2)
    damage(source / "model-1.safetensors")
    assert_refused(r"model-1.safetensors is (damaged or cut off|missing)", source, tmp_path / "out")


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(file.read_bytes()[:-99]), lambda file: file.unlink()])
def test_a_checkpoint_that_is_cut_off(damage, tmp_path):
    folder = convert(write_hf(tmp_path / "hf"), tmp_path / "megatron")
    damage(folder / "release" / "__0_0.distcp")
    assert_refused(r"__0_0.distcp is missing or cut off: \S+ is not in it", folder, tmp_path / "out")
    folder = convert(write_hf(tmp_path / "again"), tmp_path / "megatron", "--overwrite")
    (folder / "release" / "common.pt").unlink()
    assert_refused("does not describe its model", folder, tmp_path / "out")
    (folder / "release" / ".metadata").unlink()
    assert_refused("is not a complete checkpoint", folder, tmp_path / "out")


@pytest.mark.parametrize("part", [0, 0.5], ids=["empty", "half"])
@pytest.mark.parametrize(
    ("file", "message"),
    [
        (".metadata", "is not a complete checkpoint"),
        ("common.pt", "is damaged, copy it again"),
        ("metadata.json", "is damaged, copy it again"),
    ],
)
def test_the_description_of_a_checkpoint_that_is_cut_off(file, message, part, checkpoint, tmp_path):
    folder = tmp_path / "megatron"
    shutil.copytree(checkpoint, folder)
    whole = (folder / "release" / file).read_bytes()
    (folder / "release" / file).write_bytes(whole[: int(part * len(whole))])
    assert_refused(message, folder, tmp_path / "out")
