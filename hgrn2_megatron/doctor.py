"""`python -m hgrn2_megatron doctor`: what this machine has, what a run will use, and whether it computes HGRN2."""

import importlib.metadata
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from hgrn2_kernels import chunk_hgrn2, implementation, recurrent_hgrn2

# releases that the test suite or a run of the unmodified scripts has seen
TESTED = ("0.18", "0.19")
# relative Frobenius error of the output and the gradients that rounding alone explains
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 6e-3}


def main() -> int:
    """Print the report; returns 0, or 1 where training would not be HGRN2."""
    # of what is imported to be looked at
    warnings.simplefilter("ignore")
    wrong = []
    for name, value, problem in _lines():
        print(f"{name:<20}{value}")
        if problem:
            wrong.append(f"{name}: {problem}")
    print("\n".join(["", *(f"WRONG  {problem}" for problem in wrong)]) if wrong else "\nReady to train.")
    return 1 if wrong else 0


def _lines() -> Iterator[tuple[str, str, str | None]]:
    """What is looked at, what was seen, and what would make training wrong."""
    gpu = torch.cuda.is_available()
    yield "python", sys.version.split()[0], None
    yield "torch", f"{torch.__version__}, CUDA {torch.version.cuda}", None
    yield (
        "triton",
        _version("triton") or "missing: needed on a GPU",
        "install triton" if gpu and not _has("triton") else None,
    )
    yield "GPU", _gpu() if gpu else "none: Megatron trains on the CPU over gloo, for tests and small runs", None
    yield "megatron-core", *_megatron()
    te = _version("transformer-engine")
    yield (
        "Transformer Engine",
        te or "missing: no FP8, no packed or context parallel attention; --transformer-impl local",
        None,
    )
    fused = _has("fused_weight_gradient_mlp_cuda") and _has("scaled_masked_softmax_cuda")
    off = "missing, in part or whole: the launcher turns off gradient accumulation fusion, masked softmax fusion"
    yield "apex", "fused weight gradients, masked softmax" if fused else off, None
    device = "cuda" if gpu else "cpu"
    form = implementation(device, torch.bfloat16)
    slow = ": right, and slow" if form == "pytorch" else ""
    yield "operator", f"op={form}{slow}", None
    yield "norms", "Transformer Engine's, fused into the projections" if te else "PyTorch's", None
    for dtype, allowed in ALLOWED.items():
        start = time.perf_counter()
        self_check(device, dtype)
        compiled = time.perf_counter()
        error = self_check(device, dtype)
        end = time.perf_counter()
        seen = (
            f"error {error:.1e} against the recurrence, {end - compiled:.1f} s, the first time {compiled - start:.1f} s"
        )
        yield f"self-check {str(dtype)[6:]}", seen, None if error <= allowed else f"more than {allowed}"


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def _megatron() -> tuple[str, str | None]:
    """The release, and why it cannot be used."""
    if not _has("megatron.core"):
        return "missing", "install megatron-core"
    from hgrn2_megatron import cpu

    cpu.install()
    import megatron.core

    release = megatron.core.__version__
    try:
        # its hooks check their targets
        import hgrn2_megatron.spec  # noqa: F401
        from hgrn2_megatron import megatron_hooks

        megatron_hooks.install_arguments({})
    except (ImportError, RuntimeError) as error:
        return release, str(error)
    return release if release.startswith(TESTED) else f"{release}: not among the tested {' and '.join(TESTED)}", None


def self_check(device: str, dtype: torch.dtype) -> float:
    """Largest relative error of the operator's output and gradients against the recurrence in fp64.

    Of a small batch with gates of every strength: ordinary, closed and nearly open ones, half of the bounds 0.
    """
    generator = torch.Generator().manual_seed(0)
    q, f, v, do = torch.randn(4, 1, 200, 2, 64, generator=generator).to(dtype).double()
    f[:, 60:100] = f[:, 60:100] * 8 - 20
    f[:, 100:140] += 6
    f = f.to(dtype).double()
    bound = torch.rand(2, 64, generator=generator).float().double()
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
