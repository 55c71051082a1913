"""The gpu tests of the kernels for Hopper."""

import sys

import pytest

sys.exit(pytest.main("-q -m gpu tests/kernels/test_hopper.py tests/kernels/test_sharded.py".split()))
