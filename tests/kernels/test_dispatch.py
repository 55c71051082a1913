"""The choice between the two sets of kernels, by inputs, GPU and release of Triton. No test here needs a GPU."""

import pytest
import torch
import triton

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
    assert dispatch.kernels(shape, V, dtype, capability, (3, 6)) == expected


@pytest.mark.parametrize(
    ("release", "expected"), [((3, 5), "triton"), ((3, 6), "hopper"), ((3, 9), "hopper"), ((3, 10), "triton")], ids=str
)
def test_releases_of_triton_that_were_not_tried_run_the_kernels_for_every_gpu(release, expected):
    assert dispatch.kernels((8, 4096, 16, 128), 128, torch.bfloat16, H100, release) == expected


def test_the_release_is_that_of_triton():
    assert triton.__version__.startswith(".".join(map(str, dispatch.RELEASE)))
