"""Compare the kernels of hgrn2_kernels.hopper with the kernels of hgrn2_kernels.chunk_triton on one Hopper GPU.

    python benchmarks/kernel_sets.py [--only WORD ...] [--list] [--out FILE.json]

A case is a shape and a strength of the gates. The script compares the results of both modules on the inputs that it
times. tests/kernels/test_hopper.py compares them with the float64 recurrence. The table calls the kernels of
chunk_triton "any GPU". "Beyond" stands for the work on chunks beyond the fast limit. Times are in a CUDA graph, except
for "eager" and the single kernels.
"""

import argparse
import dataclasses
import time

import report
import torch
from operator_times import D, ceilings, milliseconds, time_in_graph

from hgrn2_kernels import chunk_triton, hopper
from hgrn2_kernels.inputs import Inputs

SHOWN = ("forward", "both", "both, eager", "both, recomputed")
HEAD = f"| case | predicted us | {' | '.join(f'{x}, Hopper / any GPU' for x in SHOWN)} | kernels | errors |"
# largest relative Frobenius error against chunk_triton; both results are in bf16
CEILING = 5e-3
GATES = {
    "ordinary": lambda x: x,
    # about the gates of a trained model; the next two are stronger
    "times 4": lambda x: 4 * x,
    "times 16": lambda x: 16 * x,
    "closed": lambda x: x - 30,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        B, T, H: batch, length and heads.
        predicted: predicted time of forward and backward in microseconds, written down before the run.
        gate: strength of the gates, a key of GATES.
        documents: number of documents that are packed in the row, of about equal lengths. 0 means a dense batch.
    """

    B: int
    T: int
    H: int
    predicted: int
    gate: str = "ordinary"
    documents: int = 0

    @property
    def shape(self) -> str:
        return f"{self.B}x{self.T}x{self.H}" + (f", {self.documents} documents" if self.documents else "")

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.gate}"


CASES = [
    Case(8, 4096, 16, 1001),
    Case(8, 4096, 16, 2700, "times 4"),
    Case(8, 4096, 16, 5790, "closed"),
    Case(1, 32768, 16, 1348),
    Case(8, 2048, 8, 343),
    Case(1, 32768, 4, 404),
    Case(8, 4095, 16, 1100),
    Case(1, 32768, 16, 1270, documents=37),
    Case(1, 32768, 16, 1960, documents=3),
    Case(8, 4096, 16, 5450, "times 16"),
    # many short documents, of 32 tokens and of 256
    Case(1, 32768, 16, 4000, documents=1024),
    Case(1, 32768, 16, 1600, documents=128),
]


def error(got, want) -> float:
    """Return the relative Frobenius error, computed one batch row at a time to save memory."""
    off = sum(((x.double() - y.double()) ** 2).sum() for x, y in zip(got, want, strict=True))
    return (off / sum((y.double() ** 2).sum() for y in want)).sqrt().item()


def measure(case: Case) -> dict:
    """Return the times of a case in milliseconds, and its errors."""
    torch.manual_seed(0)
    fused = torch.randn(case.B, case.T, case.H, 3, D, device="cuda", dtype=torch.bfloat16)
    q, f, v = fused.unbind(3)
    f.copy_(GATES[case.gate](f.float()))
    bound = torch.rand(case.H, D, device="cuda") * 0.9 + 0.04
    if case.gate != "ordinary":
        # gates without a lower bound can close completely
        bound[:, ::2] = 0
    do = torch.randn(case.B, case.T, case.H, D, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = None
    if case.documents:
        borders = torch.arange(case.documents + 1, dtype=torch.int32, device="cuda")
        cu_seqlens = (borders * (case.T // case.documents) - borders % 7).contiguous()
        cu_seqlens[-1] = case.T
    inputs = Inputs(q, f, v, bound, None, cu_seqlens, D**-0.5)
    row = dict(name=case.name, shape=case.shape, predicted=case.predicted)

    def both(forward, backward, save_states=True):
        o, _, saved = forward(inputs, False, save_states)
        dq, df, dv, dbound, _ = backward(do, None, inputs, saved)
        return dict(o=o, dq=dq, df=df, dv=dv, dbound=dbound)

    new, old = (hopper.chunk_forward, hopper.chunk_backward), (chunk_triton.chunk_forward, chunk_triton.chunk_backward)
    begun = time.time()
    got = both(*new)
    torch.cuda.synchronize()
    row["first call s"] = time.time() - begun
    again = both(*new)
    row["same bits"] = all(torch.equal(x, again[name]) for name, x in got.items())
    del again
    want = both(*old)
    row["errors"] = {name: error(x, want[name]) for name, x in got.items()}
    # here the backward computes the states again, by chunk_state
    got = both(*new, save_states=False)
    row["errors"] |= {f"{name}, recomputed": error(x, want[name]) for name, x in got.items() if name != "o"}
    del want, got

    measured = row["measured"] = {}
    for name, (forward, backward) in {"Hopper": new, "any GPU": old}.items():
        measured[f"{name}: forward"] = time_in_graph(lambda forward=forward: forward(inputs, False, True))
        measured[f"{name}: both"] = time_in_graph(lambda pair=(forward, backward): both(*pair))
        measured[f"{name}: both, eager"] = milliseconds(lambda pair=(forward, backward): both(*pair))
        measured[f"{name}: both, recomputed"] = time_in_graph(lambda pair=(forward, backward): both(*pair, False))
    # each kernel by itself
    run = hopper.HopperLaunches(q, f, v, bound, D**-0.5, cu_seqlens)
    o, dq, df, dv = (torch.empty_like(do) for _ in range(4))
    first, dfirst = None, None
    if run.plan.segments.cut:

        def before(y, reverse):
            return run._enter(y, None, None, None, reverse, False)[0]

        first, dfirst = before(v, False), before(do, True)
        measured["before"] = milliseconds(lambda: before(v, False))
        measured["before, reversed"] = milliseconds(lambda: before(do, True))
    states = run.forward(v, first, o)
    run.lists(gradients=True)
    row["beyond"] = (run.bands > 1).float().mean().item()
    measured["forward kernel"] = milliseconds(lambda: run.forward(v, first, o))
    measured["list"] = milliseconds(lambda: run.lists(gradients=False))
    measured["o beyond"] = milliseconds(lambda: run.output(v, states, o))
    dstates = torch.zeros_like(states)
    measured["backward kernel"] = milliseconds(lambda: run.backward(v, do, states, dfirst, dstates, dq, df, dv))
    measured["lists"] = milliseconds(lambda: run.lists(gradients=True))
    measured["dv beyond"] = milliseconds(lambda: run.output(do, dstates, dv, reverse=True))
    measured["dq, df beyond"] = milliseconds(lambda: run.gradients(v, do, states, dstates, dq, df))
    return row


def line(row: dict) -> str:
    """Return the line of the table for a case."""
    us = {name: f"{1e3 * ms:.0f}" for name, ms in row["measured"].items()}
    times = " | ".join(f"{us[f'Hopper: {x}']} / {us[f'any GPU: {x}']}" for x in SHOWN)
    kernels = ", ".join(f"{name} {x}" for name, x in us.items() if ":" not in name)
    errors = " ".join(f"{name} {x:.1e}" for name, x in row["errors"].items())
    bad = "" if all(x <= CEILING for x in row["errors"].values()) else " WRONG"
    bad += "" if row["same bits"] else " NOT THE SAME BITS TWICE"
    beyond = f"{100 * row['beyond']:.0f}% beyond"
    return f"| {row['name']}, {beyond} | {row['predicted']} | {times} | {kernels} | {errors}{bad} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="run only cases whose name has one of these words")
    parser.add_argument("--list", action="store_true", help="print the cases and exit")
    report.add_option(parser)
    args = parser.parse_args()
    chosen = [x for x in CASES if not args.only or any(word in x.name for word in args.only)]
    if args.list:
        return print(*chosen, sep="\n")
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU: --list is all that works here")
    print(f"{torch.cuda.get_device_name()}: a copy moves {ceilings()[0]:.2f} TB/s\n")
    print(HEAD, "|---" * (len(SHOWN) + 4) + "|", sep="\n")
    rows = []
    for case in chosen:
        with torch.no_grad():
            rows.append(measure(case))
        print(line(rows[-1]), flush=True)
        # written after each case, so that a run that is stopped leaves what it has measured
        report.write(args.out, rows)


if __name__ == "__main__":
    main()
