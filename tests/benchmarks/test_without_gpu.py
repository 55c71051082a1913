"""Benchmarks that cannot run as they were started say why."""

import harness
import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize(
    ("benchmark", "message"),
    [("kernel_sets.py", "this machine has no GPU"), ("context_parallel.py", "start it with torchrun")],
)
def test_a_benchmark_for_gpus_is_refused(benchmark, message):
    done = harness.python(str(harness.ROOT / "benchmarks" / benchmark))
    assert done.returncode == 2 and message in done.stdout and "Traceback" not in done.stdout
