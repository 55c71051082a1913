"""The project as others get it: an sdist, a wheel made of it, installed in another place."""

import shutil
import subprocess
import sys

from harness import ROOT

LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "quickstart", "compare")
SEEN = """
import importlib.metadata, pathlib
import hgrn2_kernels, hgrn2_megatron
for module in (hgrn2_kernels, hgrn2_megatron):
    print(pathlib.Path(module.__file__).parent.parent)
print(importlib.metadata.version("hgrn2-megatron") == hgrn2_megatron.__version__)
print(len(list(pathlib.Path(hgrn2_megatron.__file__).parent.glob("patches/*.patch"))))
"""


def run(*command, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_sdist_makes_a_wheel_that_installs_elsewhere(tmp_path):
    source, dist, site = (tmp_path / name for name in ("source", "dist", "site"))
    shutil.copytree(ROOT, source, ignore=LEFT_OUT)
    dist.mkdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run("-c", build, dist, cwd=source)
    (sdist,) = dist.glob("*.tar.gz")
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", site)
    run(*install, sdist)
    found, kernels, version, patches = run("-c", SEEN, cwd=tmp_path, env={"PYTHONPATH": str(site)}).split()
    assert found == kernels == str(site)
    assert version == "True"
    assert int(patches) == len(list((ROOT / "hgrn2_megatron" / "patches").glob("*.patch"))) > 0
