"""The models for transformers beside fla's, on a GPU or in Triton's interpreter, where fla is installed."""

import pytest
import torch

# it prepares the process for fla, so it comes before fla
pytest.importorskip("fla_models")

import fla_models
from fla.models import HGRN2Config, HGRN2ForCausalLM
from hf_models import MODELS, TIME, assert_close, build, tokens
from transformers import AutoConfig

from hgrn2_kernels import hf


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "no positions"])
@torch.no_grad()
def test_folders_and_logits_are_flas(kind, tmp_path):
    hf.register(exist_ok=True)
    assert type(AutoConfig.for_model("hgrn2")) is hf.HGRN2Config
    ours = build(kind)
    ours.save_pretrained(tmp_path / "ours")
    theirs, found = HGRN2ForCausalLM.from_pretrained(
        tmp_path / "ours", attn_mode="fused_recurrent", output_loading_info=True
    )
    assert not any(found.values()), found
    theirs.save_pretrained(tmp_path / "theirs")
    again = hf.HGRN2ForCausalLM.from_pretrained(tmp_path / "theirs")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
    ours, theirs = (model.to(fla_models.DEVICE).eval() for model in (ours, theirs))
    ids = tokens(2, TIME).to(fla_models.DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    logits, expected = (m(ids, attention_mask=mask, use_cache=False).logits[mask.bool()] for m in (ours, theirs))
    assert_close(logits, expected, 1e-4)


def test_fla_refuses_a_model_without_positions():
    """It must not compute with positions that the model was not trained with."""
    with pytest.raises(ValueError, match="'rope_theta' must be positive"):
        HGRN2Config(**build("no positions").config.to_dict())
