"""Time the launches over chunks beyond the fast limit, with other tiles, grids and registers, on one Hopper GPU.

    python benchmarks/probes/beyond.py

A row of the table is one variant. The variants run on gates of three kinds at 8 x 4096 x 16: "times 4", where nearly
all chunks take the banded form, those of a trained model, where one in six does, and "closed", where all take the exact
form. The first variant of each kind is the one in use. The last column is the largest difference of dq and df to the
first variant. The same figures go to $OUT/beyond.json if OUT is set.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from fused_forward import D, error, milliseconds
from product import GATES

from hgrn2_kernels import beyond_triton, hopper
from hgrn2_kernels.launch import Launch

BENCHMARKS = Path(__file__).parents[1]
B, T, H = 8, 4096, 16


class Variant(NamedTuple):
    """One way to run the launches.

    Attributes:
        exact, banded: (channels, warps) of the gradients in the exact and in the banded form.
        output_warps: warps of a program that computes outputs.
        programs: number of programs of all three kernels.
        registers: limit of registers per thread, or None.
    """

    exact: tuple[int, int] = (16, 4)
    banded: tuple[int, int] = (64, 4)
    output_warps: int = 4
    programs: int = 264
    registers: int | None = None


FIRST = Variant()
# the variants that differ in the form that a gate takes
BANDED = (
    FIRST,
    Variant(programs=528),
    Variant(programs=1056),
    Variant(programs=4224),
    Variant(programs=396, registers=168),
    Variant(programs=1056, registers=168),
    Variant(banded=(32, 4)),
    Variant(banded=(32, 4), programs=396, registers=168),
    Variant(banded=(32, 4), programs=1056, registers=168),
    Variant(banded=(32, 4), programs=528, registers=128),
    Variant(banded=(16, 4), programs=1056, registers=168),
    Variant(banded=(64, 8), output_warps=8, programs=264, registers=128),
    Variant(banded=(64, 8), output_warps=8, programs=1056, registers=128),
)
EXACT = (
    FIRST,
    Variant(programs=1056),
    Variant(programs=4224),
    Variant(programs=396, registers=168),
    Variant((16, 8)),
    Variant((32, 4)),
    Variant((64, 4)),
    Variant((64, 4), programs=16384),
)
VARIANTS = {"times 4": BANDED, "trained model": BANDED, "closed": EXACT}


def limited(registers):
    """Return a Launch whose kernels have at most this many registers per thread."""

    class Limited(Launch):
        def _launch_by_triton(self, tensors, descriptors):
            return self.jitted[self.grid](*tensors, *self.numbers, num_warps=self.num_warps, maxnreg=registers)

    return Launch if registers is None else Limited


def benchmark():
    """Return benchmarks/operator.py as a module. It is loaded by its path, because Python has an operator.py too."""
    # the programs that it imports lie beside it
    sys.path.append(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark", BENCHMARKS / "operator.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(gate: str):
    if gate == "trained model":
        leaves, do = benchmark().make_inputs(B, T, H, gate)
        return *(x.detach() for x in leaves), do
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
    for variant in VARIANTS[gate]:
        patches = dict(
            EXACT_GRADIENT=variant.exact,
            BANDED_GRADIENT=variant.banded,
            OUTPUT_WARPS=variant.output_warps,
            PROGRAMS=variant.programs,
            Launch=limited(variant.registers),
        )
        for cached in (beyond_triton._output, beyond_triton._gradient):
            cached.cache_clear()
        with patch.multiple(beyond_triton, **patches):
            row = dict(gate=gate, **variant._asdict())
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
    heads = "gates", *Variant._fields, "o us", "dv us", "dq, df us", "error"
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    rows = [row for gate in VARIANTS for row in measure(gate)]
    if os.environ.get("OUT"):
        with open(os.path.join(os.environ["OUT"], "beyond.json"), "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
