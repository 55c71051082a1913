"""Launch the kernels of benchmarks/fla_model.py and of beside_fla.py: fla's model, also after for_fla.replace.

hgrn2_kernels.hf launches the same kernels as fla's model after for_fla.replace.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.argv[1:] = []

import fla_model  # noqa: E402

from hgrn2_kernels import for_fla  # noqa: E402

# tensors without numbers cannot be copied to the host
torch.Tensor.cpu = lambda x: x
# all layers launch the same kernels
SIZES = fla_model.Sizes(layers=2)


# the model of benchmarks/quality/beside_fla.py
QUALITY = fla_model.Sizes(layers=2, hidden=768, vocab=32768, training=((32, 2048),))


def train(model, sizes):
    model.train()
    for batch, length in sizes.training:
        data = fla_model.tokens(batch, length, sizes.vocab)
        model(data, labels=data).loss.backward()


def run(model):
    fla_model.results(model, SIZES)
    train(model, SIZES)
    model.eval()
    with torch.inference_mode():
        for batch, length in SIZES.prefill:
            model(fla_model.tokens(batch, length, SIZES.vocab), use_cache=True, logits_to_keep=1)
        for batch in SIZES.decoding:
            prompt = fla_model.tokens(batch, SIZES.prompt, SIZES.vocab)
            cache = model(prompt, use_cache=True).cache
            for _ in range(2):
                cache = model(prompt[:, -1:], past_key_values=cache, use_cache=True).cache


fla_model.results(fla_model.build(SIZES, torch.float32, "fused_recurrent"), SIZES)
train(fla_model.build(QUALITY, torch.bfloat16), QUALITY)
model = fla_model.build(SIZES, torch.bfloat16)
run(model)
for_fla.replace(model)
run(model)
