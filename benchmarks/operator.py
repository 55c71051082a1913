"""Times of the operator's Triton kernels on one GPU, beside cuDNN attention, on inputs it has checked first.

    python benchmarks/operator.py [--shapes 8x4096x16 1x32768x16 ...]

Shapes are batch x length x heads, heads of 128, bf16, inputs as strided views of one fused projection. A shape is
timed only after its outputs and gradients agree with the PyTorch form in fp32 on the very same inputs. Medians of CUDA
events, in ms; then each kernel on its own.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from hgrn2_kernels.chunk_triton import Launches, TritonChunkHGRN2
from hgrn2_kernels.chunkwise import ChunkHGRN2

D = 128
CEILING = {"o": 3e-3, "dv": 3e-3, "dq": 4e-3, "df": 4e-3}
# what is done to the raw gate, N(0, 1)
GATES = {"ordinary": (1, 0), "x16": (16, 0), "all closed": (1, -30), "open": (1, 6)}


def time(function) -> float:
    return do_bench(function, warmup=20, rep=100, return_mode="median")


def inputs(B: int, T: int, H: int, gate: str = "ordinary") -> list[Tensor]:
    """q, f, v as leaves that are views of one projection [B, T, H, 3, D], and do."""
    scale, shift = GATES[gate]
    fused = torch.randn(B, T, H, 3, D, device="cuda", dtype=torch.bfloat16)
    fused[..., 1, :].mul_(scale).add_(shift)
    leaves = [x.detach().requires_grad_() for x in fused.unbind(3)]
    return [*leaves, torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)]


def kernels(q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    return TritonChunkHGRN2.apply(q, f, v, None, None, D**-0.5, None)[0]


def pytorch(q: Tensor, f: Tensor, v: Tensor) -> Tensor:
    return ChunkHGRN2.apply(q, f, v, None, None, D**-0.5, None)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def check(leaves: list[Tensor], do: Tensor):
    """Stop unless o, dq, df and dv are those of the PyTorch form in fp32."""
    results = []
    for op, dtype in ((kernels, torch.bfloat16), (pytorch, torch.float32)):
        own = [x.detach().to(dtype).requires_grad_() for x in leaves]
        o = op(*own)
        o.backward(do.to(dtype))
        results.append((o.detach(), *(x.grad for x in own)))
    for name, got, want in zip(("o", "dq", "df", "dv"), *results, strict=True):
        error = ((got.float() - want).norm() / want.norm()).item()
        if not error <= CEILING[name]:
            raise SystemExit(f"{name} is wrong, relative error {error:.1e}: not timed")


def forward_and_both(op, leaves: list[Tensor], do: Tensor) -> tuple[float, float]:
    """Median ms of the forward, and of forward and backward."""

    def both():
        for x in leaves:
            x.grad = None
        op(*leaves).backward(do)

    with torch.no_grad():
        forward = time(lambda: op(*leaves))
    return forward, time(both)


def each_kernel(leaves: list[Tensor], do: Tensor) -> str:
    q, f, v = (x.detach() for x in leaves)
    run = Launches(q, f, v, None, D**-0.5, None)
    states, _ = run.states(v, None)
    dstates, _ = run.states(do, None, reverse=True)
    times = {
        "state": time(lambda: run.states(v, None)),
        "state reversed": time(lambda: run.states(do, None, reverse=True)),
        "o": time(lambda: run.output(v, states)),
        "dv": time(lambda: run.output(do, dstates, reverse=True)),
        "dq, df": time(lambda: run.gradients(v, do, states, dstates)),
    }
    exact = run.slow.float().mean().item()
    return ", ".join(f"{name} {ms:.3f}" for name, ms in times.items()) + f"; {exact:.0%} of the chunks exact"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["8x4096x16", "1x32768x16", "1x32768x4", "8x2048x8"])
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__)
    print("| batch x length x heads | gates | forward | fwd + bwd | attention forward | fwd + bwd |")
    print("|---|---|---|---|---|---|")
    details = []
    for n, shape in enumerate(args.shapes):
        B, T, H = map(int, shape.split("x"))
        peer = [torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        peers = "{:.3f} | {:.3f}".format(*forward_and_both(attention, peer, torch.randn_like(peer[0])))
        # the gates matter at one shape: they decide how many chunks take the exact path
        for gate in GATES if n == 0 else ["ordinary"]:
            *leaves, do = inputs(B, T, H, gate)
            check(leaves, do)
            ours = "{:.3f} | {:.3f}".format(*forward_and_both(kernels, leaves, do))
            print(f"| {shape} | {gate} | {ours} | {peers} |", flush=True)
            details.append(f"{shape} {gate}: {each_kernel(leaves, do)}")
    print("\n".join(details))


if __name__ == "__main__":
    main()
