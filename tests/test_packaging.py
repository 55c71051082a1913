"""The two distributions as others get them: sdists, wheels made of them, installed in another place."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from harness import ROOT

LEFT_OUT = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "quickstart", "compare")
SEEN = """
import importlib.metadata, pathlib
import hgrn2_kernels, hgrn2_megatron
for module in (hgrn2_kernels, hgrn2_megatron):
    print(pathlib.Path(module.__file__).parent.parent)
for name in ("hgrn2-kernels", "hgrn2-megatron"):
    print(importlib.metadata.version(name))
print(hgrn2_megatron.__version__)
"""
# The recurrence, the PyTorch form, and a model for transformers that is saved, loaded and generates. The process finds
# neither this project's Megatron side nor, until the model needs it, anything beside torch.
ALONE = """
import importlib.util, sys
sys.path[:0] = sys.argv[1:]
import torch, hgrn2_kernels
q, f, v = torch.randn(3, 2, 70, 2, 8, dtype=torch.float64)
inputs = q, f, v, torch.full((2, 8), 0.5, dtype=torch.float64)
torch.testing.assert_close(hgrn2_kernels.chunk_hgrn2(*inputs)[0], hgrn2_kernels.recurrent_hgrn2(*inputs)[0])
print(hgrn2_kernels.__file__, importlib.util.find_spec("hgrn2_megatron"))
print([name for name in ("triton", "transformers") if name in sys.modules])

from hgrn2_kernels import hf
hf.register()
sizes = dict(hidden_size=32, num_hidden_layers=2, expand_ratio=16, vocab_size=61, eos_token_id=None)
made = hf.HGRN2ForCausalLM(hf.HGRN2Config(attn={"layers": [1], "num_heads": 2}, **sizes))
made.save_pretrained("saved")
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("saved")
prompt = torch.tensor([[3, 5, 7]])
torch.testing.assert_close(model(prompt).logits, made(prompt).logits, rtol=0, atol=0)
print(model.generate(prompt, max_new_tokens=2, pad_token_id=0).shape)
print([name for name in ("megatron", "fla") if name in sys.modules])
"""
RELEASES = [path.stem.removeprefix("megatron-") for path in sorted((ROOT / "patches").glob("*.patch"))]
VERSION = tomllib.loads((ROOT / "kernels" / "pyproject.toml").read_text())["project"]["version"]


def run(*command, **options) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], text=True, capture_output=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    """The wheels of hgrn2-kernels and hgrn2-megatron, built of their sdists."""
    folder = tmp_path_factory.mktemp("wheels")
    shutil.copytree(ROOT, folder / "source", ignore=LEFT_OUT)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    pip = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder)
    for source in (folder / "source" / "kernels", folder / "source"):
        run("-c", build, folder, cwd=source)
    run(*pip, *folder.glob("*.tar.gz"))
    return sorted(folder.glob("*.whl"))


def test_each_wheel_holds_its_own_package_and_names_what_it_needs(wheels):
    needed = [
        {"torch>=2.11", 'triton>=3.6; platform_system == "Linux"'},
        {f"hgrn2-kernels=={VERSION}", "safetensors>=0.4", "megatron-core[training]<0.21,>=0.18"},
    ]
    for wheel, package, needs in zip(wheels, ("hgrn2_kernels", "hgrn2_megatron"), needed, strict=True):
        with zipfile.ZipFile(wheel) as file:
            names = file.namelist()
            metadata = email.message_from_bytes(file.read(f"{package}-{VERSION}.dist-info/METADATA"))
            assert "Apache License" in file.read(f"{package}-{VERSION}.dist-info/licenses/LICENSE").decode()
        assert {name.partition("/")[0] for name in names} == {package, f"{package}-{VERSION}.dist-info"}
        requires = metadata.get_all("Requires-Dist")
        assert {line for line in requires if "extra ==" not in line} == needs
        assert ('transformers<6,>=5.24; extra == "hf"' in requires) == (package == "hgrn2_kernels")
        assert len(metadata.get_payload()) > 1000


def test_the_kernels_and_the_models_for_transformers_run_from_their_wheel_alone(wheels, tmp_path):
    # -S leaves out the editable installs of this project; torch's folder goes after the wheel
    others = Path(torch.__file__).parents[1]
    assert not (others / "hgrn2_kernels").exists()
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = {"cwd": tmp_path, "env": env}
    found = run("-S", "-c", ALONE, wheels[0], others, **options).splitlines()
    assert found == [f"{wheels[0]}/hgrn2_kernels/__init__.py None", "[]", "torch.Size([1, 5])", "[]"]


def test_both_wheels_install_elsewhere_with_every_module_and_patch(wheels, tmp_path):
    site = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, *wheels)
    elsewhere = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}
    assert run("-c", SEEN, **elsewhere).split() == [str(site)] * 2 + [VERSION] * 3
    assert modules(site / "hgrn2_megatron") == modules(ROOT / "hgrn2_megatron")
    assert modules(site / "hgrn2_kernels") == modules(ROOT / "kernels" / "hgrn2_kernels")
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
