"""The report on a machine says what a run will use, if training would be wrong, and which releases are untried."""

import re

import harness
import pytest

from hgrn2_kernels import dispatch
from hgrn2_megatron import doctor

BROKEN = """
import sys, torch
from hgrn2_kernels import op
right = op.chunk_hgrn2
import hgrn2_megatron.doctor as doctor
doctor.chunk_hgrn2 = lambda q, f, v, b: right(q, f * 1.01, v, b)
sys.exit(doctor.main())
"""


def test_says_what_a_run_will_use():
    done = harness.python("-m", "hgrn2_megatron", "doctor")
    assert done.returncode == 0, done.stdout
    seen = {line[:20].strip(): line[20:] for line in done.stdout.splitlines()}
    assert seen["megatron-core"].startswith("0.19") and "not been tried" not in done.stdout
    # no commit of this repository
    assert "+" not in seen["megatron-core"]
    assert seen["operator"].startswith("op=")
    assert "Ready to train." in done.stdout


def test_an_operator_that_is_not_hgrn2_is_found():
    done = harness.python("-c", BROKEN)
    assert done.returncode == 1 and "WRONG  self-check float32" in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("package", "version", "tried"),
    [
        ("torch", "2.11.0+cu130", True),
        ("torch", "2.9.1", False),
        ("torch", "3.0.0", False),
        ("triton", "3.8.2", True),
        ("triton", "3.10.0", False),
        ("megatron-core", "0.20.0rc0", False),
        ("transformer-engine", "2.20.2", True),
        ("transformer-engine", "2.4.0", False),
        ("transformer-engine", None, True),
    ],
)
def test_releases_outside_of_those_that_were_tried_are_named(package, version, tried):
    note = doctor.untried(package, version)
    assert note is None if tried else note.startswith(f"{package} {version} ") and doctor.TRIED[package][1] in note


def test_the_report_names_an_untried_release(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_lines", lambda: iter([("torch", "2.9.1", None)]))
    monkeypatch.setattr(doctor, "_installed", lambda: {"torch": "2.9.1", "triton": "3.6.0"})
    assert doctor.main() == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "been tried" in line]
    assert len(notes) == 1 and notes[0].startswith("NOTE   torch 2.9.1")


def test_a_machine_without_megatron_gets_a_report(monkeypatch):
    def find_spec(name):
        raise ModuleNotFoundError("No module named 'megatron'")

    monkeypatch.setattr(doctor.importlib.util, "find_spec", find_spec)
    assert "install megatron-core" in " ".join(map(str, doctor._megatron()))


def test_a_megatron_that_the_cpu_mode_does_not_know_gets_a_report():
    program = "import megatron.core.inference.communication_utils as utils; del utils._is_cuda; "
    done = harness.python("-c", f"{program}from hgrn2_megatron import doctor; doctor.main()")
    assert "WRONG  megatron-core" in done.stdout and "Traceback" not in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("capability", "operator", "widths"),
    [((7, 5), "none for this GPU", None), ((8, 9), "op=triton", "128 in float32 and 256 in bfloat16")],
)
def test_a_gpu_that_is_too_old_is_wrong_and_the_others_have_widest_heads(capability, operator, widths, monkeypatch):
    monkeypatch.setattr(doctor.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(doctor, "_gpu", lambda: "a GPU")
    monkeypatch.setattr(doctor, "_megatron", lambda: ("0.19.2", None))
    monkeypatch.setattr(doctor, "self_check", lambda device, dtype: 0.0)
    lines = {name: (value, problem) for name, value, problem in doctor._lines()}
    assert lines["operator"][0] == operator and bool(lines["operator"][1]) == (widths is None)
    assert ("self-check bfloat16" in lines) == (widths is not None)
    if widths:
        assert lines["widest heads"][0] == f"--hgrn2-expand-ratio up to {widths}"


def read(name: str) -> str:
    return (harness.ROOT / name).read_text()


def test_limits_and_makefile_agree_with_the_releases_that_were_tried():
    allowed = "".join(map(read, ("setup.py", "pyproject.toml", "kernels/pyproject.toml")))
    # "megatron-core[training]>=0.18,<0.21"
    lowest = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', allowed))
    assert {package: lowest.get(package) for package in doctor.TRIED} == {
        package: oldest for package, (oldest, _) in doctor.TRIED.items()
    }
    # the tests run on the oldest megatron-core and on the newest Triton too
    beside = dict(re.findall(r"\$\(VENV\)/([a-z-]+)-(\d+\.\d+)\.\d+$", read("Makefile"), re.M))
    assert beside == {"megatron-core": doctor.TRIED["megatron-core"][0], "triton": doctor.TRIED["triton"][1]}


def test_pages_agree_with_the_releases_that_were_tried():
    names = {"torch": "torch", "Triton": "triton", "megatron-core": "megatron-core"}
    for page in (harness.ROOT / "README.md", *harness.ROOT.glob("docs/**/*.md")):
        for name, *releases in re.findall(rf"({'|'.join(names)}) (\d+\.\d+) to (\d+\.\d+)", page.read_text()):
            assert tuple(releases) == doctor.TRIED[names[name]], page


@pytest.mark.parametrize(
    ("capability", "gluon", "line"),
    [
        ((9, 0), ((3, 0), (99, 0)), "those for Hopper in bf16 with heads of 128, and those for every GPU otherwise"),
        ((9, 0), ((99, 1), (99, 2)), "those for every GPU: those for Hopper need Triton 99.1 to 99.2"),
        ((8, 0), ((3, 0), (99, 0)), "those for every GPU"),
        ((10, 0), ((3, 0), (99, 0)), "those for every GPU"),
    ],
)
def test_the_kernels_of_a_gpu_are_named(capability, gluon, line, monkeypatch):
    monkeypatch.setattr(dispatch, "GLUON", gluon)
    assert doctor._kernels(capability) == line
