"""Small models for transformers with random weights, of every kind that the format has."""

import harness
import torch

from hgrn2_kernels import hf

VOCAB, TIME, PAD = harness.VOCAB, 24, 0
SIZES = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=96, expand_ratio=16, vocab_size=VOCAB)
ATTENTION = {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "rope_theta": 5000.0}
WINDOW = [{"layers": [0], "num_heads": 4, "window_size": 5, "qkv_bias": True}, {"layers": [2], "num_heads": 2}]
MODELS = {
    "pure": {},
    "tied": {"tie_word_embeddings": True},
    "no bounds": {"use_lower_bound": False, "expand_ratio": None, "num_heads": 2},
    "hybrid": {"attn": ATTENTION},
    "no positions": {"attn": ATTENTION | {"rope_theta": None}},
    "window": {"attn": WINDOW},
}


def randomize(model: torch.nn.Module):
    """Draw weights that leave every linear regime."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if "norm" in name else noise * (1 if "bounds" in name else 0.2))


def build(kind: str, **changes) -> hf.HGRN2ForCausalLM:
    model = hf.HGRN2ForCausalLM(hf.HGRN2Config(**SIZES | MODELS[kind] | {"eos_token_id": None} | changes))
    randomize(model)
    return model.eval()


def tokens(*shape) -> torch.Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(2))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()
