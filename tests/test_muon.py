"""Muon and the projection of an HGRN2 layer, which it splits by its own sizes or, in 0.18, by those of attention."""

import pytest
import torch
from model_settings import gpt_settings

from hgrn2_megatron import muon
from hgrn2_megatron.requirements import check


@pytest.mark.parametrize(("heads", "is_split"), [(2, True), (4, False)])
def test_muon_of_the_oldest_release_splits_heads_of_the_size_of_attentions(heads, is_split, monkeypatch):
    settings = gpt_settings(optimizer="muon", num_attention_heads=heads)
    assert check(settings) == []
    monkeypatch.setattr(muon, "megatron_release", lambda: (0, 18))
    warnings = check(settings)
    assert is_split == (warnings == []) and all("give --num-attention-heads 2" in warning for warning in warnings)
    weight = torch.nn.Parameter(torch.empty(768, 256))
    muon.mark_parts(weight, [128] * 3, settings)
    assert getattr(weight, "is_qkv", False) == is_split
