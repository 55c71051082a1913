"""Logits of models for transformers beside fla's, on a GPU or in Triton's interpreter; not a test.

The one argument is an empty folder. A line `kind: error` is printed for each kind of model, relative to the largest
logit. Each folder that one side saves is loaded by the other with equal weights.
"""

import importlib.machinery
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import evaluate_exported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    # before anything else imports Triton
    evaluate_exported.interpret()

from hf_models import MODELS, TIME, build, tokens  # noqa: E402


def attention(q, k, v, causal, window_size):
    """Compute what flash_attn_func computes. q, k and v are [B, T, H, D]."""
    ages = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    seen = (ages >= 0) & ((ages <= window_size[0]) | (window_size[0] < 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.to(q.device), enable_gqa=True).transpose(1, 2)


def main(folder: Path):
    # fla has no attention without flash-attn, which needs a GPU
    stand_in = types.ModuleType("flash_attn")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    stand_in.flash_attn_func, stand_in.flash_attn_varlen_func = attention, None
    sys.modules["flash_attn"] = stand_in
    import fla.models
    from transformers import AutoConfig

    from hgrn2_kernels import hf

    assert type(AutoConfig.for_model("hgrn2")) is fla.models.HGRN2Config
    hf.register(exist_ok=True)
    assert type(AutoConfig.for_model("hgrn2")) is hf.HGRN2Config
    ids = tokens(2, TIME).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for kind in MODELS:
        ours = build(kind)
        ours.save_pretrained(folder / kind)
        theirs, found = fla.models.HGRN2ForCausalLM.from_pretrained(
            folder / kind, attn_mode="fused_recurrent", output_loading_info=True
        )
        assert not any(found.values()), found
        theirs.save_pretrained(folder / f"{kind} of fla")
        again = hf.HGRN2ForCausalLM.from_pretrained(folder / f"{kind} of fla")
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in ours.state_dict().items())
        ours, theirs = ours.to(DEVICE), theirs.to(DEVICE).eval()
        # the stand-in takes no padding
        masks = [mask] if "attn" not in MODELS[kind] else []
        for given in (None, *masks):
            with torch.no_grad():
                logits, expected = (m(ids, attention_mask=given, use_cache=False).logits for m in (ours, theirs))
            errors = (logits - expected).abs().amax(-1)[mask.bool() if given is not None else ...]
            print(f"{kind}: {errors.max() / expected.abs().max():.1e}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
