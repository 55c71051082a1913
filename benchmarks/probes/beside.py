"""Compare two checkouts of kernels/ on one GPU: check that their results have the same bits, and time both.

    python benchmarks/probes/beside.py OLD NEW [--only WORD ...] [--rounds N]

OLD and NEW are folders that hold a package hgrn2_kernels, such as kernels/ of two checkouts. Each runs in a process of
its own. Both make the same inputs and run a forward and a backward, and the script compares the bits of all results.
Then the processes take turns, and only one of them uses the GPU at a time. Times are microseconds of a forward, and of
a forward and backward, both eager and in a CUDA graph. The script prints the medians over the turns and the ratio
new / old, and writes them to $OUT/beside.json if OUT is set. It exits with 1 if any bits differ.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

GATES = {"ordinary": lambda x: x, "times 4": lambda x: 4 * x, "closed": lambda x: x - 30}
MODES = ("forward", "both", "forward, graph", "both, graph")


@dataclasses.dataclass(frozen=True)
class Case:
    """One input.

    Attributes:
        B, T, H, D: batch, length, heads, and channels per head.
        dtype: "bfloat16" or "float32".
        gate: strength of the gates, a key of GATES. With "times 4" chunks need the banded form, with "closed" the
            exact form.
    """

    B: int
    T: int
    H: int
    D: int
    dtype: str
    gate: str = "ordinary"

    @property
    def name(self) -> str:
        return f"{self.B}x{self.T}x{self.H} heads of {self.D} {self.dtype} {self.gate}"


CASES = [
    Case(*shape, D, dtype)
    for dtype in ("bfloat16", "float32")
    for D in (128, 64)
    for shape in ((8, 4096, 16), (1, 32768, 16), (8, 2048, 8))
]
CASES += [Case(8, 2048, 8, 128, dtype, gate) for dtype in ("bfloat16", "float32") for gate in ("times 4", "closed")]
# so small that the eager time is the time of the host
CASES += [Case(1, 64, 1, 128, "bfloat16")]


class Worker:
    """The process that runs one checkout: it reads one JSON command per line, and answers each with one line."""

    def prepare(self, case: dict) -> dict:
        """Make the inputs of a case, and return a digest of each result."""
        from hgrn2_kernels import chunk_hgrn2_fused

        self.operator = chunk_hgrn2_fused
        case = Case(**case)
        self.graphs = {}
        torch.manual_seed(0)
        dtype = getattr(torch, case.dtype)
        qfv = torch.randn(case.B, case.T, case.H, 3, case.D, device="cuda")
        qfv[..., 1, :] = GATES[case.gate](qfv[..., 1, :])
        self.qfv = qfv.to(dtype).requires_grad_()
        self.bound = torch.empty(case.H, case.D, device="cuda").uniform_(0.04, 0.94).requires_grad_()
        self.do = torch.randn(case.B, case.T, case.H, case.D, device="cuda").to(dtype)
        results = {"o": self.forward(), **dict(zip(("dqfv", "dbound"), self.both(), strict=True))}
        return {name: self._digest(x) for name, x in results.items()}

    def origin(self, _) -> str:
        """Return the folder of the package that this process runs."""
        import hgrn2_kernels

        return str(Path(hgrn2_kernels.__file__).resolve().parents[1])

    def forward(self):
        with torch.no_grad():
            return self.operator(self.qfv, self.bound)[0]

    def both(self):
        o, _ = self.operator(self.qfv, self.bound)
        return torch.autograd.grad(o, (self.qfv, self.bound), self.do)

    def time(self, mode: str) -> float:
        """Return the mean time of one call in microseconds, over calls that take about 100 ms together."""
        call = self._call(mode)
        self._elapsed(call, 3)
        count = max(5, min(2000, int(100 / self._elapsed(call, 5))))
        return 1000 * self._elapsed(call, count)

    def _call(self, mode):
        name, _, graph = mode.partition(", ")
        call = getattr(self, name)
        if not graph:
            return call
        if name not in self.graphs:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call()
            torch.cuda.current_stream().wait_stream(stream)
            self.graphs[name] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[name]):
                # the results stay alive as long as the graph
                self.graphs[name].results = call()
        return self.graphs[name].replay

    @staticmethod
    def _elapsed(call, count) -> float:
        """Return the mean milliseconds of count calls."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    @staticmethod
    def _digest(x) -> str:
        return hashlib.sha256(x.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()

    def serve(self):
        for line in sys.stdin:
            command, argument = json.loads(line)
            print(json.dumps(getattr(self, command)(argument)), flush=True)


class Checkout:
    """A worker process for one folder with a package hgrn2_kernels."""

    def __init__(self, folder: Path):
        if not (folder / "hgrn2_kernels" / "__init__.py").exists():
            raise SystemExit(f"{folder} holds no package hgrn2_kernels: name the folder kernels/ of a checkout")
        environment = os.environ | {"PYTHONPATH": str(folder.resolve())}
        command = [sys.executable, __file__, "--worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask("origin", None)
        origin = self.answer()
        if origin != str(folder.resolve()):
            raise SystemExit(f"{folder} was asked for, and {origin} was imported: uninstall hgrn2_kernels there")

    def ask(self, *command):
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self.process.wait()}: see its error above")
        return json.loads(line)


def compare(case: Case, checkouts: list[Checkout], rounds: int) -> dict:
    """Return whether the bits are equal, and the times of both checkouts in each mode."""
    # both compile at the same time
    for checkout in checkouts:
        checkout.ask("prepare", dataclasses.asdict(case))
    old, new = (checkout.answer() for checkout in checkouts)
    row = {"name": case.name, "differing bits": [name for name in old if old[name] != new[name]]}
    times = {mode: ([], []) for mode in MODES}
    for turn in range(rounds):
        for mode in MODES:
            # the two checkouts take turns in coming first
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                checkouts[which].ask("time", mode)
                times[mode][which].append(checkouts[which].answer())
    for mode, (before, after) in times.items():
        before, after = statistics.median(before), statistics.median(after)
        row[mode] = {"old us": round(before, 1), "new us": round(after, 1), "ratio": round(after / before, 4)}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="folder with the old package hgrn2_kernels")
    parser.add_argument("new", type=Path, help="folder with the new package hgrn2_kernels")
    parser.add_argument("--only", nargs="+", default=[], help="run the cases whose name contains one of these words")
    parser.add_argument("--rounds", type=int, default=7, help="number of turns of each checkout (default 7)")
    args = parser.parse_args()
    checkouts = [Checkout(args.old), Checkout(args.new)]
    rows = []
    for case in CASES:
        if args.only and not any(word in case.name for word in args.only):
            continue
        rows.append(compare(case, checkouts, args.rounds))
        row = rows[-1]
        times = ", ".join("{} {old us} -> {new us} ({ratio})".format(mode, **row[mode]) for mode in MODES)
        bits = f"BITS DIFFER in {row['differing bits']}" if row["differing bits"] else "same bits"
        print(f"{row['name']}: {bits}; {times}", flush=True)
        if "OUT" in os.environ:
            (Path(os.environ["OUT"]) / "beside.json").write_text(json.dumps(rows, indent=1))
    for checkout in checkouts:
        checkout.process.stdin.close()
        checkout.process.wait()
    raise SystemExit(any(row["differing bits"] for row in rows))


if __name__ == "__main__":
    if sys.argv[1:] == ["--worker"]:
        Worker().serve()
    else:
        main()
