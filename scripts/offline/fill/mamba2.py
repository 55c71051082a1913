"""Launch the kernels of mamba-ssm that Megatron's Mamba2 uses, in the shapes of benchmarks/quality."""

import torch
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

H, D, STATE, CHUNK = 24, 64, 128, 128


def run(batch: int, length: int, train: bool):
    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype, device="cuda").requires_grad_(train)

    inputs = leaf(batch, length, H, D), leaf(batch, length, H), leaf(H, dtype=torch.float32)
    b_and_c = leaf(batch, length, 1, STATE), leaf(batch, length, 1, STATE)
    bias = leaf(H, dtype=torch.float32)
    y = mamba_chunk_scan_combined(*inputs, *b_and_c, CHUNK, D=leaf(H), dt_bias=bias, dt_softplus=True)
    norm = RMSNorm(H * D, eps=1e-6, group_size=H * D, norm_before_gate=False, device="cuda", dtype=torch.bfloat16)
    out = norm(y.reshape(length, batch, H * D).contiguous(), leaf(length, batch, H * D))
    if train:
        out.float().sum().backward()


run(32, 2048, train=True)
run(16, 2048, train=False)
run(1, 32768, train=False)
