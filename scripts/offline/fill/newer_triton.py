"""benchmarks/operator_times.py and the gpu tests of the kernels for Hopper, with a Triton that dispatch.py does not let
run them."""

import runpy
import sys
from pathlib import Path

import pytest

from hgrn2_kernels import dispatch

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
dispatch.GLUON = (3, 6), dispatch.RELEASE
sys.path.insert(0, str(BENCHMARKS))
sys.argv[1:] = []
runpy.run_path(str(BENCHMARKS / "operator_times.py"), run_name="__main__")
# a test fails where it reads a number; what it had compiled by then is kept
pytest.main("-q -m gpu tests/kernels/test_hopper.py".split())
