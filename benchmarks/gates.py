"""Print statistics of the forget gates while Megatron trains, and of the bands into which the kernels cut chunks.

    torchrun --nproc_per_node=1 benchmarks/gates.py pretrain_gpt.py --spec hgrn2 [Megatron's flags]
        [--every N] [--out FILE.json]

The benchmark starts the script as `python -m hgrn2_megatron` does, on one GPU. At the first iteration and at every Nth
(default 100) it prints one line for each layer:

- f: mean and standard deviation of the raw gate
- channel means: standard deviation of a channel's mean, over channels
- channel deviations: mean and largest standard deviation within a channel
- quantiles of the raw gate, mean and largest lower bound, and the mean forget gate
- chunk: the largest decay of a chunk of 64 tokens in powers of two; the fast form allows up to 192
- bands: the shares of (chunk, block of channels) that are cut into 2, 3 and 4 bands, and that need the exact form
"""

import argparse
import sys
from pathlib import Path

import gate_strength
import report
import torch

from hgrn2_kernels import op
from hgrn2_megatron import mixer
from hgrn2_megatron.__main__ import main

COLUMNS = ["iteration", "layer", "f", "channel means", "channel deviations", "f 0.1%, 99.9%"]
COLUMNS += ["bound", "forget", "chunk", "bands"]


@torch.no_grad()
def statistics(qfv: torch.Tensor, bound: torch.Tensor | None) -> list[str]:
    """Return the cells of a layer's line after its number.

    Args:
        qfv: the projection [B, T, H, 3, K].
        bound: the lower bound [H, K] in fp32, or None where the model has none.
    """
    f = qfv.unbind(-2)[1].detach()
    x = f.float()
    b = torch.zeros_like(x[0, 0]) if bound is None else bound
    means, deviations = x.mean((0, 1)), x.std((0, 1))
    some = x.flatten()[:: max(1, x.numel() // 2**20)]
    low, high = some.quantile(torch.tensor([1e-3, 1 - 1e-3], device=x.device)).tolist()
    strength = gate_strength.strength(f, bound)
    return [
        f"{x.mean():.2f} +- {x.std():.2f}",
        f"+- {means.std():.2f}",
        f"{deviations.mean():.2f}, at most {deviations.max():.2f}",
        f"{low:.1f}, {high:.1f}",
        f"{b.mean():.3f}, at most {b.max():.3f}",
        f"{strength['forget']:.3f}",
        f"{strength['decay']}",
        " ".join(f"{share:.1%}" for share in strength["bands"][1:]),
    ]


class Recorder:
    """A replacement of the mixer's operator that also reports the gates in some iterations.

    Args:
        every: number of iterations from one report to the next.
        out: file of results, or None.
    """

    def __init__(self, every: int, out: Path | None):
        self.every, self.out, self.calls, self.layers = every, out, 0, None
        self.rows: list[dict] = []

    def __call__(self, qfv, lower_bound, **options):
        # layers are called in order; at the first call Megatron knows how many there are
        if self.layers is None:
            from megatron.training import get_args

            self.layers = get_args().num_layers
            print(f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|")
        iteration, layer = divmod(self.calls, self.layers)
        self.calls += 1
        if iteration % self.every == 0:
            cells = statistics(qfv, None if lower_bound is None else lower_bound.detach())
            print(f"| {iteration} | {layer} | {' | '.join(cells)} |", flush=True)
            self.rows.append(dict(zip(COLUMNS, [iteration, layer, *cells], strict=True)))
            # write after each row, because training may end at any time
            report.write(self.out, self.rows)
        return op.chunk_hgrn2_fused(qfv, lower_bound, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], add_help=False, allow_abbrev=False)
    parser.add_argument("--every", type=int, default=100, help="number of iterations from one report to the next")
    report.add_option(parser)
    # the other flags belong to the script
    args, sys.argv[1:] = parser.parse_known_args()
    mixer.chunk_hgrn2_fused = Recorder(args.every, args.out)
    main()
