"""Launch the kernels of fla that Megatron's gated delta net uses, in the shapes of benchmarks/quality."""

import torch
from fla.modules.convolution import causal_conv1d
from fla.modules.l2norm import l2norm
from fla.ops.gated_delta_rule import chunk_gated_delta_rule

H, D = 6, 128


def run(batch: int, length: int, train: bool):
    def leaf(*shape, dtype=torch.bfloat16):
        return torch.randn(*shape, dtype=dtype, device="cuda").requires_grad_(train)

    mixed, _ = causal_conv1d(x=leaf(batch, length, 3 * H * D), weight=leaf(3 * H * D, 4), activation="silu")
    q, k, v = (x.reshape(batch, length, H, D).contiguous() for x in mixed.chunk(3, -1))
    q, k = (x.contiguous() for x in l2norm(torch.cat([q, k], 2)).chunk(2, 2))
    gate, beta = leaf(batch, length, H, dtype=torch.float32), leaf(batch, length, H)
    o, _ = chunk_gated_delta_rule(q, k, v, g=gate, beta=beta, use_qk_l2norm_in_kernel=False)
    if train:
        o.float().sum().backward()


run(32, 2048, train=True)
run(16, 2048, train=False)
run(1, 32768, train=False)
