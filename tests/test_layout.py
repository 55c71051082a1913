"""The one-way rules of the tree: kernels know nothing of Megatron, and importing the package stays cheap."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import harness
import pytest

KERNELS = sorted((harness.ROOT / "kernels" / "hgrn2_kernels").rglob("*.py"))
# spec -> hooks -> layer -> mixer -> norm and bounds -> config: a file imports only what stands after it here
ORDER = [
    "spec",
    "megatron_hooks",
    "checkpoint",
    "arguments",
    "stack",
    "requirements",
    "megatron_flags",
    "block",
    "chunked_loss",
    "layer",
    "mixer",
    "lower_bounds",
    "norm",
    "config",
]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.stem)
def test_kernels_know_nothing_above_them(path):
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots <= {"torch", "triton", "hgrn2_kernels"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    found = imports(harness.ROOT / "hgrn2_megatron" / f"{name}.py")
    ours = {m.group(1) for m in (re.match(r"hgrn2_megatron\.(\w+)", i) for i in found) if m}
    allowed = set(ORDER[ORDER.index(name) + 1 :])
    assert ours & set(ORDER) <= allowed


def test_importing_the_package_is_cheap():
    code = "import sys, hgrn2_megatron; sys.exit(any(m in sys.modules for m in ('torch', 'megatron', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=harness.ROOT).returncode == 0


def test_kernels_folder_does_not_shadow_hugging_face():
    spec = importlib.util.find_spec("kernels")
    ours = spec and spec.origin and harness.ROOT in Path(spec.origin).resolve().parents
    assert not ours, "kernels/ is a source root, never a package"
