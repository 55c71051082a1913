"""The one-way rules of the tree: kernels know nothing of Megatron, and importing the package stays cheap."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import harness
import pytest

KERNELS = sorted((harness.ROOT / "kernels" / "hgrn2_kernels").rglob("*.py"))
PACKAGE = harness.ROOT / "hgrn2_megatron"
# Every module of the package. A module imports only modules that stand after it here, at its top or in a function.
ORDER = """
    __main__ doctor patch
    conversion.command conversion.check conversion.weights conversion.config conversion.files conversion.__init__
    spec model_hooks megatron_hooks checkpoint_hooks checkpoint_check restored_args checkpoint_flags checkpoint
    flops forms arguments
    mtp stack requirements stack_requirements fsdp megatron_flags cuda_graphs precision cpu_requirements
    sequence_requirements block chunked_loss other_mixers layer mixer muon offloading generation
    context_parallel.operator context_parallel.exchange context_parallel.pieces context_parallel.__init__
    lower_bounds norm_recompute norm tensor_parallel
    gpu_requirements settings cpu patching
    __init__ config
""".split()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: write the whole name of the module"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_know_nothing_above_them(path):
    roots = {name.split(".")[0] for name in imports(path)}
    # fla is needed by for_fla alone, and transformers by hf alone; no other module imports these two
    in_hf = path.parent.name == "hf"
    extra = {"fla"} if path.stem == "for_fla" else {"transformers"} if in_hf else set()
    assert roots <= {"torch", "triton", "hgrn2_kernels"} | extra | set(sys.stdlib_module_names)
    assert "hgrn2_kernels.for_fla" not in imports(path)
    assert in_hf or not any(name.startswith("hgrn2_kernels.hf") for name in imports(path))


def modules_among(names: set[str]) -> set[str]:
    """Return the modules of the package among imported names, each named as in ORDER."""
    inside = {name.removeprefix("hgrn2_megatron.") for name in names if name.startswith("hgrn2_megatron.")}
    return {module for module in MODULES if module in inside or module.removesuffix(".__init__") in inside}


def test_the_order_has_every_module_once():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    against = modules_among(imports(MODULES[name])) - set(ORDER[ORDER.index(name) + 1 :])
    assert not against, f"{name} imports {sorted(against)}, which stand before it in ORDER"


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 350


def test_importing_the_package_is_cheap():
    code = "import sys, hgrn2_megatron; sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT).returncode == 0


def test_kernels_folder_does_not_shadow_hugging_face():
    spec = importlib.util.find_spec("kernels")
    is_this_folder = spec and spec.origin and harness.ROOT in Path(spec.origin).resolve().parents
    assert not is_this_folder, "kernels/ is a source root, never a package"
