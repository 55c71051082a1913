"""Logits of fla's HGRN2ForCausalLM beside those of the Megatron checkpoint converted from it, on a GPU.

python fla_logits.py FOLDER [LAYERS HIDDEN TOKENS]

Prints a relative error (by the norm of fla's logits in fp32, attn_mode fused_recurrent) a line: `name: error`. What is
converted back must be what fla had written, and fla must load it with nothing missing.
"""

import sys
from pathlib import Path

import torch
from fla.models import HGRN2Config, HGRN2ForCausalLM
from megatron.core import parallel_state
from safetensors.torch import load_file

from hgrn2_megatron import cpu
from hgrn2_megatron.conversion import command as convert
from hgrn2_megatron.conversion.check import megatron_logits

BATCH, VOCAB, K = 2, 1000, 128


def fla_model(layers: int, hidden: int) -> HGRN2ForCausalLM:
    """Random weights that leave every linear regime, fp32."""
    torch.manual_seed(0)
    config = HGRN2Config(hidden_size=hidden, num_hidden_layers=layers, expand_ratio=K, vocab_size=VOCAB)
    model = HGRN2ForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.add_(0.3 * torch.randn_like(p))
            else:
                # the lower bounds start as zeros
                p.copy_(torch.randn_like(p) * (1 if "lower_bounds" in name else 1.5 * p.shape[-1] ** -0.5))
    return model


@torch.inference_mode()
def logits_of(folder: Path, tokens: torch.Tensor, dtype: torch.dtype, mode: str) -> torch.Tensor:
    model, loading = HGRN2ForCausalLM.from_pretrained(folder, dtype=dtype, attn_mode=mode, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"], loading
    assert model.dtype == dtype and model.model.layers[0].attn.mode == mode
    return model.to("cuda").eval()(tokens.to("cuda")).logits.float().cpu()


def main(folder: Path, layers: int = 12, hidden: int = 1024, num_tokens: int = 512):
    cpu.install()
    hf, checkpoint, back = (folder / name for name in ("hf", "megatron", "back"))
    fla_model(layers, hidden).save_pretrained(hf)
    convert.main([str(hf), str(checkpoint), "--no-check"])
    convert.main([str(checkpoint), str(back), "--no-check"])
    ours, theirs = (load_file(path / "model.safetensors") for path in (back, hf))
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    tokens = torch.randint(VOCAB, (BATCH, num_tokens), generator=torch.Generator().manual_seed(1))
    exact = logits_of(back, tokens, torch.float32, "fused_recurrent")

    def compare(name: str, logits: torch.Tensor):
        print(f"{name}: {((logits - exact).norm() / exact.norm()).item():.2e}", flush=True)

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        compare(f"ours {name}", megatron_logits(checkpoint, tokens, dtype)[..., :VOCAB])
        parallel_state.destroy_model_parallel()
    compare("fla fused_recurrent bf16", logits_of(hf, tokens, torch.bfloat16, "fused_recurrent"))
    compare("fla chunk bf16", logits_of(hf, tokens, torch.bfloat16, "chunk"))
    compare("fla chunk fp32", logits_of(hf, tokens, torch.float32, "chunk"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
