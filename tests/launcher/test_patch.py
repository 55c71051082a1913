"""The patches of Megatron-LM and the command that applies them; training on a patched tree is the launcher's."""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import harness
import pytest
from patched_tree import ALONE, CPU, patched_copy
from training import HGRN2, assert_equal, saved_tensors, train

from hgrn2_megatron import UsageError, arguments, megatron_hooks, patch

PATCHES = sorted(patch.PATCHES.iterdir())
INFO = "megatron/core/package_info.py"
SPEC_UTILS = "megatron/core/transformer/spec_utils.py"
WHEEL = Path(importlib.util.find_spec("megatron.core").origin).parents[2]


@pytest.fixture
def tree(tmp_path):
    """What a patch reads and writes of the installed wheel's tree, inside a repository of something else."""
    tree = tmp_path / "Megatron-LM"
    for name in (INFO, *patch.files_of(patch.find_patch(WHEEL))):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(WHEEL / name, tree / name)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    return tree


def contents(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.rglob("*.py")}


def test_a_patch_applies_once_and_is_taken_back_to_the_same_bytes(tree, capsys):
    def run(*flags) -> str:
        patch.main([str(tree), *flags])
        return capsys.readouterr().out

    before = contents(tree)
    assert "not applied to, but matches" in run("--check") and "nothing to do" in run("--reverse")
    assert contents(tree) == before
    assert f"applied to {tree}: {SPEC_UTILS}" in run()
    after = contents(tree)
    changed = {str(path.relative_to(tree)) for path in after if after[path] != before[path]}
    assert changed == set(patch.files_of(patch.find_patch(tree)))
    assert "is applied to" in run("--check") and "already applied" in run()
    assert contents(tree) == after
    assert "reversed in" in run("--reverse")
    assert contents(tree) == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (INFO, "MINOR = 19", "MINOR = 99", "is Megatron 0.99, but there are patches only for 0.18, 0.19, 0.20"),
        (SPEC_UTILS, "base_path, name = module_path", "path, name = module_path", "megatron-0.19.patch does not match"),
    ],
    ids=["unknown-release", "changed-tree"],
)
def test_a_tree_that_no_patch_matches_is_refused_and_left_alone(name, old, new, message, tree):
    text = (tree / name).read_text()
    assert old in text
    (tree / name).write_text(text.replace(old, new))
    before = contents(tree)
    done = harness.python("-m", "hgrn2_megatron", "patch", str(tree))
    assert done.returncode == 2 and "hgrn2_megatron: error:" in done.stdout and message in done.stdout, done.stdout
    assert contents(tree) == before


def test_a_folder_without_megatron_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not a Megatron-LM checkout"):
        patch.main([str(tmp_path)])


@pytest.mark.parametrize("path", PATCHES, ids=lambda path: path.stem)
def test_patches_are_of_files_that_megatron_has_and_name_no_plugin(path):
    assert all((WHEEL / name).is_file() for name in patch.files_of(path)) and patch.files_of(path)
    assert "hgrn" not in path.read_text().lower()


def test_patches_ship_with_the_package():
    setuptools = tomllib.loads((harness.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folder = harness.ROOT / setuptools["package-dir"]["hgrn2_megatron.patches"]
    patterns = setuptools["package-data"]["hgrn2_megatron.patches"]
    assert sorted(path for pattern in patterns for path in folder.glob(pattern)) == PATCHES


def test_patched_megatron_finds_specs_by_one_word_and_raises_where_there_is_none(tree):
    patch.main([str(tree)])
    found = importlib.util.spec_from_file_location("patched_spec_utils", tree / SPEC_UTILS)
    spec_utils = importlib.util.module_from_spec(found)
    found.loader.exec_module(spec_utils)
    from hgrn2_megatron import spec

    for name in (arguments.GPT, arguments.STACK):
        for words in ([name], [arguments.MODULE, name]):
            assert spec_utils.import_module(words) is getattr(spec, name)
    for words, message in (
        (["nope"], "No spec 'nope' among"),
        ([arguments.MODULE, "hgrn3"], "hgrn3"),
        (["hgrn2_megatron.spce", "hgrn2"], "hgrn2_megatron.spce"),
    ):
        with pytest.raises(ImportError, match=message):
            spec_utils.import_module(words)


@pytest.mark.parametrize(
    ("command", "hooked", "normalization"),
    [
        ("--spec local", False, "LayerNorm"),
        ("--lr 1", False, "LayerNorm"),
        ("--use-checkpoint-args", True, "LayerNorm"),
        ("--spec hgrn2 --lr 1", True, "RMSNorm"),
        ("--spec hgrn2_megatron.spec hgrn2", True, "RMSNorm"),
    ],
)
def test_runs_of_other_models_get_the_flags_and_nothing_else(command, hooked, normalization, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *command.split()])
    calls = []
    monkeypatch.setattr(megatron_hooks, "install_training", lambda: calls.append(True))
    monkeypatch.setattr(arguments, "silent_defaults", lambda: {"normalization": "RMSNorm"})
    parser = argparse.ArgumentParser()
    parser.add_argument("--normalization", default="LayerNorm")
    for _ in range(2):  # as the launcher does on a patched tree
        parser = megatron_hooks.extra_args(parser)
    args = parser.parse_args([])
    assert (bool(calls), args.normalization, args.hgrn2_layer_pattern) == (hooked, normalization, "H")


def test_a_patched_tree_trains_and_saves_as_the_launcher_does(tmp_path, monkeypatch):
    flags = (*HGRN2, "--hgrn2-layer-pattern", "H*", "--hgrn2-loss-chunk-size", 50)
    flags += ("--train-iters", 3, "--save-interval", 2, "--save")
    losses, _ = train(*flags, tmp_path / "launcher")
    monkeypatch.setenv("PYTHONPATH", str(patched_copy(WHEEL, tmp_path / "tree")))
    patched, output = train(*flags, tmp_path / "patched", *CPU, launcher=ALONE)
    assert "HGRN2: 1 of 2 layers" in output and "loss by 50 tokens" in output
    assert patched == losses and sorted(losses) == [1, 2, 3]
    for iteration in (2, 3):
        assert_equal(saved_tensors(tmp_path / "patched", iteration), saved_tensors(tmp_path / "launcher", iteration))
    # the launcher on a patched tree, and from its checkpoint
    resumed, _ = train(*flags, tmp_path / "resumed", "--load", tmp_path / "patched", "--ckpt-step", 2)
    assert resumed == {3: losses[3]}
