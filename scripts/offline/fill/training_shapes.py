"""Launch the operator in the shapes of benchmarks/quality (768 or 640 channels) and of benchmarks/pretrain.py."""

import torch

from hgrn2_kernels import chunk_hgrn2_fused


def run(batch: int, length: int, heads: int, save_states: bool, train: bool, head: int = 128):
    qfv = torch.randn(batch, length, heads, 3, head, dtype=torch.bfloat16, device="cuda").requires_grad_(train)
    bound = torch.rand(heads, head, device="cuda").requires_grad_(train)
    o, _ = chunk_hgrn2_fused(qfv, bound, save_states=save_states)
    if train:
        o.sum().backward()


# the sizes 125m and 100m
for heads in (6, 5):
    run(32, 2048, heads, save_states=True, train=True)
    run(16, 2048, heads, save_states=True, train=False)
    run(1, 32768, heads, save_states=True, train=False)
# the models with other expand ratios
for head in (16, 32, 64, 256):
    run(32, 2048, 768 // head, save_states=True, train=True, head=head)
    run(16, 2048, 768 // head, save_states=True, train=False, head=head)
for save_states in (True, False):
    run(4, 4096, 16, save_states, train=True)
    run(1, 16384, 16, save_states, train=True)
