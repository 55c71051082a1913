"""The kernels compile for each architecture and fit its shared memory; no GPU is needed for that."""

import json

import harness
import pytest

# bytes of shared memory that one block may take (CUDA programming guide, compute capabilities)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


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
        # bytes a thread spills, most of them in the exact forms; a kernel that does not fit at all takes many kilobytes
        assert kernel["stack"] <= 1100, kernel
