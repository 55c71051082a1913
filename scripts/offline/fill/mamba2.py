"""Launch the kernels of mamba-ssm that Megatron's Mamba2 uses, in the shapes of benchmarks/quality."""

import torch
from mamba_ssm.ops.triton import ssd_combined
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

H, D, STATE, CHUNK = 24, 64, 128, 128
CONVOLVED = H * D + 2 * STATE

# the convolutions of causal-conv1d are no Triton kernels, and need a GPU
ssd_combined.causal_conv1d_fwd_function = lambda x, *_: torch.empty_like(x)
ssd_combined.causal_conv1d_bwd_function = lambda x, weight, bias, *_: tuple(map(torch.empty_like, (x, weight, bias)))


def run(batch: int, length: int, train: bool):
    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype, device="cuda").requires_grad_(train)

    projected, convolution = leaf(batch, length, H * D + CONVOLVED + H), (leaf(CONVOLVED, 4), leaf(CONVOLVED))
    of_heads = leaf(H, dtype=torch.float32), leaf(H, dtype=torch.float32)
    y = ssd_combined.mamba_split_conv1d_scan_combined(
        projected, *convolution, *of_heads, D=leaf(H), chunk_size=CHUNK, headdim=D, norm_before_gate=False
    )
    norm = RMSNorm(H * D, eps=1e-6, group_size=H * D, norm_before_gate=False, device="cuda", dtype=torch.bfloat16)
    out = norm(y.transpose(0, 1).contiguous())
    if train:
        out.float().sum().backward()


run(32, 2048, train=True)
run(16, 2048, train=False)
run(1, 32768, train=False)
