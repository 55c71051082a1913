"""Megatron's loop on a GPU: the kernels train as plain PyTorch does."""

import pytest
from training import HGRN2, train

pytestmark = pytest.mark.gpu

IN_PYTORCH = """
from hgrn2_kernels import op
op.implementation = lambda device, dtype: "pytorch"
from hgrn2_megatron.__main__ import main
main()
"""


@pytest.mark.parametrize(("flags", "tolerance"), [((), 1e-5), (("--bf16",), 5e-3)], ids=["fp32", "bf16"])
def test_the_kernels_train_as_pytorch_does(tmp_path, flags, tolerance):
    program = tmp_path / "in_pytorch.py"
    program.write_text(IN_PYTORCH)
    ours, output = train(*HGRN2, *flags)
    want, _ = train(*HGRN2, *flags, launcher=(str(program),))
    assert "op=triton" in output
    assert ours.keys() == want.keys()
    for iteration, loss in ours.items():
        assert abs(float(loss) - float(want[iteration])) <= tolerance, iteration
