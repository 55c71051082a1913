"""Time the launches over chunks beyond the fast limit, with other tiles, grids and registers, on one Hopper GPU.

    python benchmarks/probes/beyond.py

A row of the table is one variant. Each variant runs on gates of two strengths at 8 x 4096 x 16: "times 4", where nearly
all chunks take the banded form, and "closed", where all take the exact form. The first variant is the one in use. The
last column is the largest difference of dq and df to the first variant. The same figures go to $OUT/beyond.json if OUT
is set.
"""

import json
import os
from unittest.mock import patch

import torch
from fused_forward import D, error, milliseconds
from product import GATES

from hgrn2_kernels import beyond_triton, hopper
from hgrn2_kernels.launch import Launch

B, T, H = 8, 4096, 16
# channels and warps of the exact gradients, programs of all three kernels, and the limit of registers per thread
VARIANTS = (
    ((16, 4), 264, None),
    ((16, 4), 1056, None),
    ((16, 4), 4224, None),
    ((16, 4), 396, 168),
    ((16, 8), 264, None),
    ((32, 4), 264, None),
    ((64, 4), 264, None),
    ((64, 4), 16384, None),
)


def limited(registers):
    """Return a Launch whose kernels have at most this many registers per thread."""

    class Limited(Launch):
        def _launch_by_triton(self, tensors, descriptors):
            return self.jitted[self.grid](*tensors, *self.numbers, num_warps=self.num_warps, maxnreg=registers)

    return Launch if registers is None else Limited


def inputs(gate: str):
    torch.manual_seed(0)
    q, f, v = torch.randn(B, T, H, 3, D, device="cuda", dtype=torch.bfloat16).unbind(3)
    f.copy_(GATES[gate](f.float()))
    bound = torch.rand(H, D, device="cuda") * 0.9 + 0.04
    bound[:, ::2] = 0
    return q, f, v, bound, torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)


def measure(gate: str) -> list[dict]:
    q, f, v, bound, do = inputs(gate)
    run = hopper.HopperLaunches(q, f, v, bound, D**-0.5, None)
    o, dq, df, dv = (torch.zeros_like(do) for _ in range(4))
    states = run.forward(v, None, o)
    run.lists(gradients=True)
    dstates = torch.zeros_like(states)
    run.backward(v, do, states, None, dstates, dq, df, dv)
    rows, first = [], None
    for tile, programs, registers in VARIANTS:
        patches = dict(EXACT_GRADIENT=tile, PROGRAMS=programs, Launch=limited(registers))
        for cached in (beyond_triton._output, beyond_triton._gradient):
            cached.cache_clear()
        with patch.multiple(beyond_triton, **patches):
            row = dict(gate=gate, tile=tile, programs=programs, registers=registers)
            row["o us"] = 1e3 * milliseconds(lambda: run.output(v, states, o))
            row["dv us"] = 1e3 * milliseconds(lambda: run.output(do, dstates, dv, reverse=True))
            row["dq, df us"] = 1e3 * milliseconds(lambda: run.gradients(v, do, states, dstates, dq, df))
        first = first or (dq.clone(), df.clone())
        row["error"] = max(error(x, want) for x, want in zip((dq, df), first, strict=True))
        rows.append(row)
        shown = (f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values())
        print("| " + " | ".join(shown) + " |", flush=True)
    return rows


def main():
    print("| gates | exact tile | programs | registers | o us | dv us | dq, df us | error |\n" + "|---" * 8 + "|")
    rows = [row for gate in ("times 4", "closed") for row in measure(gate)]
    if os.environ.get("OUT"):
        with open(os.path.join(os.environ["OUT"], "beyond.json"), "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
