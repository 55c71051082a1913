"""The report on a machine, and that it says when training would be wrong."""

import harness

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
    assert seen["megatron-core"].startswith("0.19") and "not among" not in seen["megatron-core"]
    assert seen["operator"].startswith("op=")
    assert "Ready to train." in done.stdout


def test_an_operator_that_is_not_hgrn2_is_found():
    done = harness.python("-c", BROKEN)
    assert done.returncode == 1 and "WRONG  self-check float32" in done.stdout, done.stdout
