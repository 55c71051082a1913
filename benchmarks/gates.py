"""Statistics of the forget gates while Megatron trains, and how many bands the kernels cut their chunks into for them.

    torchrun --nproc_per_node=1 benchmarks/gates.py pretrain_gpt.py --spec hgrn2 [Megatron's flags] [--every N]

Runs the script as `python -m hgrn2_megatron` does on one GPU. At the first iteration and at every Nth (default 100) it
prints one table line a layer: mean and standard deviation of the raw gate over everything and of its mean and deviation
a channel over channels, quantiles of the raw gate, mean and largest lower bound, mean forget gate, the largest decay of
a chunk (64 tokens) in powers of two, of which the fast form takes 192, and the share of (chunk, block of channels)
that is cut into 2, 3 and 4 bands, and that is taken exactly.
"""

import sys

import torch

from hgrn2_kernels import op
from hgrn2_kernels.chunk_triton import chunk_forward
from hgrn2_megatron import mixer
from hgrn2_megatron.__main__ import main

HEAD = """\
| iteration | layer | f | channel means | channel deviations | f 0.1%, 99.9% | bound | forget | chunk | bands |
|---|---|---|---|---|---|---|---|---|---|"""


@torch.no_grad()
def line(iteration: int, layer: int, qfv: torch.Tensor, bound: torch.Tensor | None) -> str:
    """One layer's line, from qfv [B, T, H, 3, K] and its bound [H, K]."""
    q, f, v = (x.detach() for x in qfv.unbind(-2))
    x = f.float()
    b = torch.zeros_like(x[0, 0]) if bound is None else bound
    means, deviations = x.mean((0, 1)), x.std((0, 1))
    some = x.flatten()[:: max(1, x.numel() // 2**20)]
    low, high = some.quantile(torch.tensor([1e-3, 1 - 1e-3], device=x.device)).tolist()
    forget = b + (1 - b) * torch.sigmoid(x)
    chunk = forget.log2()[:, : x.shape[1] // 64 * 64].unflatten(1, (-1, 64)).sum(2).amin().item()
    _, _, (_, bands) = chunk_forward(q, f, v, bound, None, None, 1.0, save_states=True)
    shares = " ".join(f"{(bands == n).float().mean():.1%}" for n in (2, 3, 4, 5))
    return (
        f"| {iteration} | {layer} | {x.mean():.2f} +- {x.std():.2f} | +- {means.std():.2f} | "
        f"{deviations.mean():.2f}, at most {deviations.max():.2f} | {low:.1f}, {high:.1f} | {b.mean():.3f}, at most "
        f"{b.max():.3f} | {forget.mean():.3f} | {-chunk:.0f} | {shares} |"
    )


class Recorder:
    """The mixer's operator, which looks at what it is given in some of the calls."""

    def __init__(self, every: int):
        self.every, self.calls, self.layers = every, 0, None

    def __call__(self, qfv, lower_bound, **options):
        # layers are called in order, and the first call of all sees how many there are
        if self.layers is None:
            from megatron.training import get_args

            self.layers = get_args().num_layers
            print(HEAD)
        iteration, layer = divmod(self.calls, self.layers)
        self.calls += 1
        if iteration % self.every == 0:
            print(line(iteration, layer, qfv, None if lower_bound is None else lower_bound.detach()), flush=True)
        return op.chunk_hgrn2_fused(qfv, lower_bound, **options)


if __name__ == "__main__":
    every = 100
    if "--every" in sys.argv:
        place = sys.argv.index("--every")
        every = int(sys.argv[place + 1])
        del sys.argv[place : place + 2]
    mixer.chunk_hgrn2_fused = Recorder(every)
    main()
