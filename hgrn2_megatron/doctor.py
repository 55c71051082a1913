"""Report what this machine has and what a run will use, and check the operator: `python -m hgrn2_megatron doctor`."""

import importlib.metadata
import importlib.util
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from hgrn2_kernels import chunk_hgrn2, implementation, recurrent_hgrn2
from hgrn2_kernels.checks import widest_head
from hgrn2_megatron.gpu_requirements import too_old

# oldest and newest release of each package that was tried; setup.py and kernels/pyproject.toml allow no older ones
TRIED = {
    "torch": ("2.11", "2.15"),
    "triton": ("3.6", "3.9"),
    "megatron-core": ("0.18", "0.19"),
    "transformer-engine": ("2.20", "2.20"),
}
# largest relative Frobenius error of the output and of the gradients that rounding can cause
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


def main() -> int:
    """Print the report. Return 0, or 1 if training on this machine would give wrong results."""
    # importing Megatron and Transformer Engine prints warnings that do not matter here
    warnings.simplefilter("ignore")
    wrong = []
    for name, value, problem in _lines():
        print(f"{name:<20}{value}")
        if problem:
            wrong.append(f"WRONG  {name}: {problem}")
    notes = [f"NOTE   {note}" for package, version in _installed().items() if (note := untried(package, version))]
    print("\n".join(["", *notes, *(wrong or ["Ready to train."])]))
    return 1 if wrong else 0


def untried(package: str, version: str | None) -> str | None:
    """Return a sentence if a release of a package in `TRIED` is older or newer than all that were tried.

    Args:
        package: a key of `TRIED`.
        version: the installed version, such as "2.11.0+cu130", or None if the package is missing.
    """
    oldest, newest = TRIED[package]
    if version is None or _release(oldest) <= _release(version) <= _release(newest):
        return None
    tried = newest if oldest == newest else f"{oldest} to {newest}"
    return f"{package} {version} has not been tried with this plugin, which was tried with {tried}"


def _release(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version: (2, 11) for "2.11.0+cu130"."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def _installed() -> dict[str, str | None]:
    """Return the installed version of each package in `TRIED`."""
    installed = {package: _version(package) for package in TRIED}
    # a checkout on PYTHONPATH comes before the installed release
    megatron = sys.modules.get("megatron.core")
    return installed | ({"megatron-core": _release_of(megatron)} if megatron else {})


def _lines() -> Iterator[tuple[str, str, str | None]]:
    """Yield the lines of the report: a name, what was found, and a problem that would make training wrong, or None."""
    gpu = torch.cuda.is_available()
    yield "python", sys.version.split()[0], None
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}", None
    yield (
        "triton",
        _version("triton") or "missing, and needed on a GPU",
        "it is missing: install triton" if gpu and not _has("triton") else None,
    )
    yield "GPU", _gpu() if gpu else "none: Megatron trains on the CPU over gloo, enough for tests and small runs", None
    yield "megatron-core", *_megatron()
    te = _version("transformer-engine")
    yield (
        "Transformer Engine",
        te or "missing: use --transformer-impl local; FP8 and packed or context-parallel attention need it",
        None,
    )
    fused = _has("fused_weight_gradient_mlp_cuda") and _has("scaled_masked_softmax_cuda")
    off = "missing, or without these kernels: the launcher turns off fusion of gradient accumulation and masked softmax"
    yield "apex", "has kernels for weight gradients and masked softmax" if fused else off, None
    device = "cuda" if gpu else "cpu"
    if gpu and (problem := too_old(torch.cuda.get_device_capability(0))):
        yield "operator", "none for this GPU", problem
        return
    form = implementation(device, torch.bfloat16)
    slow = ": correct but slow" if form == "pytorch" else ""
    yield "operator", f"op={form}{slow}", None
    if gpu:
        yield "kernels", _kernels(torch.cuda.get_device_capability(0)), None
        widths = (f"{widest_head(dtype, torch.cuda.get_device_capability(0))} in {str(dtype)[6:]}" for dtype in ALLOWED)
        yield "widest heads", f"--hgrn2-expand-ratio up to {' and '.join(widths)}", None
    yield "norms", "from Transformer Engine, fused into the projections" if te else "from PyTorch", None
    for dtype, allowed in ALLOWED.items():
        start = time.perf_counter()
        self_check(device, dtype)
        compiled = time.perf_counter()
        error = self_check(device, dtype)
        end = time.perf_counter()
        seen = f"error {error:.1e} against the recurrence; {end - compiled:.1f} s, first call {compiled - start:.1f} s"
        wrong = f"the error {error:.1e} is larger than {allowed}: this operator does not compute HGRN2"
        yield f"self-check {str(dtype)[6:]}", seen, None if error <= allowed else wrong


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module is in
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _kernels(capability: tuple[int, int]) -> str:
    """Return which kernels of the operator run on a GPU of this compute capability."""
    from hgrn2_kernels import dispatch

    if dispatch.kernels((1, 1, 1, 128), 128, torch.bfloat16, capability) == "hopper":
        return "those for Hopper in bf16 with heads of 128, and those for every GPU otherwise"
    oldest, newest = (".".join(map(str, release)) for release in dispatch.GLUON)
    hopper = f": those for Hopper need Triton {oldest} to {newest}" if capability == (9, 0) else ""
    return f"those for every GPU{hopper}"


def _release_of(core: ModuleType) -> str:
    """Return the version of megatron.core, with the commit only if it is a checkout.

    A wheel names the commit of the git repository in which its environment happens to lie.
    """
    is_checkout = (Path(core.__path__[0]).parents[1] / ".git").exists()
    return core.__version__ if is_checkout else core.__version__.split("+")[0]


def _megatron() -> tuple[str, str | None]:
    """Return the release of megatron-core, and the reason if it cannot be used."""
    if not _has("megatron.core"):
        return "missing", "it is missing: install megatron-core"
    from hgrn2_megatron import cpu

    release = _version("megatron-core") or "unknown"
    try:
        cpu.install()
        import megatron.core

        release = _release_of(megatron.core)
        # the hooks check Megatron's functions before they wrap them
        import hgrn2_megatron.spec  # noqa: F401
        from hgrn2_megatron import megatron_hooks

        megatron_hooks.install_arguments({})
    except (ImportError, RuntimeError) as error:
        return release, str(error)
    return release, None


def self_check(device: str, dtype: torch.dtype) -> float:
    """Return the largest relative error of the operator's output and gradients against the recurrence in fp64.

    The batch is small. Its gates are ordinary, closed and nearly open, and half of the lower bounds are 0.
    """
    generator = torch.Generator().manual_seed(0)
    q, f, v, do = torch.randn(4, 1, 200, 2, 128, generator=generator).to(dtype).double()
    f[:, 60:100] = f[:, 60:100] * 8 - 20
    f[:, 100:140] += 6
    f = f.to(dtype).double()
    bound = torch.rand(2, 128, generator=generator).float().double()
    bound[:, ::2] = 0
    results = []
    forms: list[tuple[Callable, torch.dtype]] = [(chunk_hgrn2, dtype), (recurrent_hgrn2, torch.float64)]
    for op, kind in forms:
        leaves = [x.to(device, kind).requires_grad_() for x in (q, f, v)]
        own_bound = bound.to(device, torch.float64 if kind == torch.float64 else torch.float32)
        o, _ = op(*leaves, own_bound)
        o.backward(do.to(device, kind))
        results.append([x.detach().double() for x in (o, *(leaf.grad for leaf in leaves))])
    return max(((got - want).norm() / want.norm()).item() for got, want in zip(*results, strict=True))
