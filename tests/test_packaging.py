"""The project as others get it: an sdist, a wheel made of it, installed in another place."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT

LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "quickstart", "compare")
SEEN = """
import importlib.metadata, pathlib
import hgrn2_kernels, hgrn2_megatron
for module in (hgrn2_kernels, hgrn2_megatron):
    print(pathlib.Path(module.__file__).parent.parent)
print(importlib.metadata.version("hgrn2-megatron") == hgrn2_megatron.__version__)
"""
RELEASES = [path.stem.removeprefix("megatron-") for path in sorted((ROOT / "patches").glob("*.patch"))]


def run(*command, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("from_sdist", [True, False], ids=["sdist", "folder"])
def test_a_wheel_installs_elsewhere_with_every_module_and_patch(from_sdist, tmp_path):
    source, dist, site = (tmp_path / name for name in ("source", "dist", "site"))
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    if from_sdist:
        dist.mkdir()
        build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
        run("-c", build, dist, cwd=source)
        (source,) = dist.glob("*.tar.gz")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site)
    run(*install, source)
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}
    found, kernels, version = run("-c", SEEN, **elsewhere).split()
    assert found == kernels == str(site)
    assert version == "True"
    assert modules(site / "hgrn2_megatron") == modules(ROOT / "hgrn2_megatron")
    assert known_patches(tmp_path, **elsewhere) == known_patches(tmp_path, cwd=ROOT, env=os.environ) == RELEASES != []


def modules(package: Path) -> set[Path]:
    return {path.relative_to(package) for path in package.rglob("*.py")}


def known_patches(folder: Path, **options) -> list[str]:
    """Return the Megatron releases for which `python -m hgrn2_megatron patch` says that it has a patch."""
    info = folder / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True, exist_ok=True)
    info.write_text("MAJOR = 0\nMINOR = 99\n")
    done = subprocess.run(
        [sys.executable, "-m", "hgrn2_megatron", "patch", folder], text=True, capture_output=True, **options
    )
    assert done.returncode == 2, done.stdout + done.stderr
    return re.findall(r"0\.\d+", done.stderr.partition("there are patches only for")[2])
