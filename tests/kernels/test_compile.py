"""The kernels compile for each architecture and fit its shared memory; no GPU is needed for that."""

import json

import harness
import pytest
import torch
from operator_cases import TRITON_RELEASE

from hgrn2_kernels.checks import widest_head

# bytes of shared memory that one block may take (CUDA programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# Bytes of stack that a thread may take, for registers that are spilled. The exact forms spill most. A kernel that does
# not fit at all takes many kilobytes. In fp32 chunk_gradient takes 1896 bytes with Triton 3.8, and less with 3.6.
STACK = {"bf16": 1400, "fp32": 1800 if TRITON_RELEASE < (3, 8) else 2000}


@pytest.mark.parametrize(
    ("arch", "dtype", "K"),
    [(80, "bf16", 128), (90, "bf16", 128), (90, "fp32", 128), (90, "bf16", 256), (100, "bf16", 128)],
)
def test_kernels_compile_and_fit(arch, dtype, K):
    done = harness.python("tests/compile_kernels.py", str(arch), dtype, str(K))
    assert done.returncode == 0, done.stdout[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(kernels) == 20
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[arch], kernel
        assert kernel["stack"] <= STACK[dtype], kernel


@pytest.mark.skipif(TRITON_RELEASE != (3, 6), reason="it stops Triton 3.6 within a compilation")
def test_the_widest_heads_fit_every_gpu():
    tried = [(80, torch.float32), (89, torch.float32), (89, torch.bfloat16)]
    cases = {f"{arch},{DTYPES[dtype]},{widest_head(dtype, divmod(arch, 10))}": arch for arch, dtype in tried}
    # wider fp32 heads are refused there
    too_wide = "89,fp32,256"
    assert list(cases) == ["80,fp32,256", "89,fp32,128", "89,bf16,256"]
    done = harness.python("tests/shared_memory.py", *cases, too_wide)
    assert done.returncode == 0, done.stdout[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wanted = {line["case"]: line["shared"] for line in lines}
    assert all(wanted[case] <= SHARED[arch] for case, arch in cases.items()), wanted
    assert wanted[too_wide] > SHARED[89]


PROGRAM = """
import torch
from hgrn2_kernels import chunk_hgrn2
x = torch.randn(1, 128, 1, 3, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
chunk_hgrn2(*x.unbind(3), None)[0].sum().backward()
"""


def test_a_program_is_compiled_ahead_of_the_gpu_it_runs_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "program.py").write_text(PROGRAM)
    done = harness.python("scripts/compile_for_gpu.py", str(tmp_path / "program.py"))
    assert done.returncode == 0, done.stdout[-3000:]
    compiled = {path.stem for path in tmp_path.glob("cache/*/*.cubin")}
    assert compiled == {"chunk_state_kernel", "chunk_output_kernel", "chunk_gradient_kernel"}
