"""The rules of a GPU: its compute capability, and the widest heads that the kernels take on it."""

import pytest
import torch
from model_settings import gpt_settings

from hgrn2_megatron import UsageError
from hgrn2_megatron.requirements import check


@pytest.mark.parametrize(
    ("capability", "changes", "message"),
    [
        ((7, 5), {"bf16": True}, "compute capability 7.5, and the kernels need 8.0 .* CUDA_VISIBLE_DEVICES="),
        ((9, 0), {"bf16": True, "hgrn2_expand_ratio": 512}, "bfloat16 .* --hgrn2-expand-ratio 256 or less$"),
        ((9, 0), {"hgrn2_expand_ratio": 512}, "float32 .* --hgrn2-expand-ratio 256 or less$"),
        ((8, 9), {"hgrn2_expand_ratio": 256}, "compute capability 8.9 .* --hgrn2-expand-ratio 128 or less, or --bf16$"),
        ((8, 9), {"hgrn2_expand_ratio": 256, "bf16": True}, None),
        ((8, 0), {"hgrn2_expand_ratio": 256}, None),
        ((8, 9), {}, None),
    ],
)
def test_heads_and_gpus_that_the_kernels_do_not_take_are_refused(capability, changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    settings = gpt_settings(hidden_size=1024, **changes)
    if message is None:
        return check(settings)
    with pytest.raises(UsageError, match=message):
        check(settings)
