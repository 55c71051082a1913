"""The tests' own partitioner of packed documents against Transformer Engine's, which Megatron uses."""

import pytest
import torch
from reference_attention import own_tokens


@pytest.mark.gpu
@pytest.mark.parametrize("cp", [2, 4])
def test_deals_out_documents_as_transformer_engine_does(cp):
    tex = pytest.importorskip("transformer_engine_torch")
    borders = [0, 8, 24, 32, 40, 104]
    cu_seqlens = torch.tensor(borders, dtype=torch.int32, device="cuda")
    for rank in range(cp):
        theirs = tex.thd_get_partitioned_indices(cu_seqlens, borders[-1], cp, rank)
        assert own_tokens(borders[-1], borders, "documents", rank, cp).tolist() == theirs.tolist()
