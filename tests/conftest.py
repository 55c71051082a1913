"""Tests skip without the GPU or the Megatron-LM checkout that they need. Without a GPU, Triton's interpreter runs.

Each test has a seed of its own, so that its numbers do not depend on the tests before it.
"""

import importlib.metadata
import os
import zlib
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when a kernel is decorated whether to interpret it, so before anything imports one
    os.environ.setdefault("TRITON_INTERPRET", "1")
    from triton.runtime import interpreter

    binary = interpreter.InterpreterBuilder.binary_op

    def binary_op(self, *operands_and_op):
        """Compute as Triton does, and give comparisons the type int1.

        In Triton's interpreter they have the type of their operands, and since 3.9 it refuses such a mask.
        """
        result = binary(self, *operands_and_op)
        return interpreter.TensorHandle(result.data, interpreter.tl.int1) if result.data.dtype == bool else result

    interpreter.InterpreterBuilder.binary_op = binary_op


def pytest_addoption(parser):
    parser.addoption("--any-gpu", action="store_true", help="run the operator's kernels for every GPU, also on Hopper")


def pytest_configure(config):
    if config.getoption("--any-gpu"):
        from hgrn2_kernels import dispatch

        dispatch.IN_USE = False


def pytest_report_header():
    return f"megatron-core {importlib.metadata.version('megatron-core')}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture(scope="session")
def megatron_lm() -> Path:
    """A Megatron-LM checkout, named by the environment variable MEGATRON_LM."""
    if "MEGATRON_LM" not in os.environ:
        pytest.skip("needs a Megatron-LM checkout: set MEGATRON_LM to its folder")
    return Path(os.environ["MEGATRON_LM"])
