"""A checkpoint that the tests of conversion share."""

import pytest
from conversion_cases import HYBRID, convert, write_hf


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A hybrid that was converted to Megatron, beside the folder `hf` that it comes from. Tests only read both."""
    folder = tmp_path_factory.mktemp("converted")
    return convert(write_hf(folder / "hf", **HYBRID), folder / "megatron")
