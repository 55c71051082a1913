"""Which kernels take which inputs. No GPU is needed."""

import pytest
import torch

from hgrn2_kernels import dispatch

H100 = (9, 0)


@pytest.mark.parametrize(
    ("shape", "V", "dtype", "capability", "expected"),
    [
        ((8, 4096, 16, 128), 128, torch.bfloat16, H100, "hopper"),
        ((1, 1, 1, 128), 128, torch.bfloat16, H100, "hopper"),
        ((8, 4096, 16, 128), 128, torch.float16, H100, "triton"),
        ((8, 4096, 16, 128), 128, torch.float32, H100, "triton"),
        ((8, 4096, 16, 64), 64, torch.bfloat16, H100, "triton"),
        ((8, 4096, 16, 128), 256, torch.bfloat16, H100, "triton"),
        ((8, 4096, 16, 128), 128, torch.bfloat16, (8, 0), "triton"),
        ((8, 4096, 16, 128), 128, torch.bfloat16, (10, 0), "triton"),
    ],
    ids=str,
)
def test_which_kernels_run(shape, V, dtype, capability, expected):
    assert dispatch.kernels(shape, V, dtype, capability) == expected
