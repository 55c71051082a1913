"""Run racecheck of compute-sanitizer on the kernels for Hopper, and show the machine code of every pair of accesses.

    python benchmarks/probes/race.py FOLDER [--seconds N]

The kernels run forward and backward on three small inputs, each in a process of its own. FOLDER gets, for input N:

    race_N.log.gz    everything that racecheck printed
    pairs_N.txt      every pair of accesses once, and how many hazards racecheck counted for it. For both accesses it
                     shows the machine code around them, and the barriers before and after them.

A pair is harmless if a barrier that racecheck does not know orders its two accesses.
"""

import argparse
import collections
import gzip
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# tokens, boundaries of packed sequences, and the factor of the gates
INPUTS = ((150, None, 1.0), (150, [0, 0, 5, 70, 140], 8.0), (1100, [0, 800, 1100], 2.0))
# in a line of racecheck: the kind of an access, the kernel, and the offset of the instruction in it
ACCESS = re.compile(r"(Read|Write) access .*?\b([A-Za-z_]\w*)(?:\([^)]*\))?\+(0x[0-9a-f]+)")
HAZARDS = re.compile(r"\[(\d+) hazards?\]")
# in a line of nvdisasm: the offset of an instruction
OFFSET = re.compile(r"/\*([0-9a-f]{4,})\*/\s+\S")
# instructions that order accesses, or wait for them
BARRIERS = re.compile(r"\b(BAR\.|SYNCS|WARPSYNC|DEPBAR|UTMA|FENCE|MEMBAR|WARPGROUP)")


def run_kernels(number: int, cubins: Path):
    """Run the kernels on one input, and write the path of the machine code of each kernel to the file `cubins`."""
    import torch
    from triton.runtime.jit import JITFunction

    from hgrn2_kernels import chunk_hgrn2, launch

    # every launch goes through Triton, which returns the compiled kernel; this changes nothing on the GPU
    launch.makes_private_call = lambda run: False
    found = collections.defaultdict(set)
    run = JITFunction.run

    def recorded(self, *args, **options):
        compiled = run(self, *args, **options)
        found[self.__name__] |= {str(x) for x in compiled.metadata_group.values() if str(x).endswith(".cubin")}
        return compiled

    JITFunction.run = recorded
    torch.manual_seed(0)
    T, borders, factor = INPUTS[number]
    q, f, v = torch.randn(1, T, 1, 3, 128, device="cuda", dtype=torch.bfloat16).unbind(3)
    q, f, v = (x.detach().requires_grad_() for x in (q, factor * f, v))
    bound = torch.rand(1, 128, device="cuda").requires_grad_()
    cu_seqlens = None if borders is None else torch.tensor(borders, dtype=torch.int32, device="cuda")
    state = torch.randn(1 if borders is None else len(borders) - 1, 1, 128, 128, device="cuda").requires_grad_()
    for save_states in (True, False):
        options = dict(initial_state=state, output_final_state=True, cu_seqlens=cu_seqlens, save_states=save_states)
        o, final = chunk_hgrn2(q, f, v, bound, **options)
        (o.float().sum() + final.sum()).backward()
    torch.cuda.synchronize()
    cubins.write_text(json.dumps({name: sorted(paths) for name, paths in found.items()}))


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit, or of the copy in the triton package."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or str(bundled)


def pairs_of(text: str):
    """Yield (one access, the other, number of hazards) for every pair in the output of racecheck.

    An access is (kind, kernel, offset).
    """
    first = None
    for line in text.splitlines():
        found = ACCESS.search(line)
        access = found and (found[1], found[2], int(found[3], 16))
        if "Race reported between" in line:
            first = access
        elif first and access:
            hazards = HAZARDS.search(line)
            yield first, access, int(hazards[1]) if hazards else 0


class Code:
    """The machine code of a kernel."""

    def __init__(self, cubin: str):
        command = [tool("nvdisasm"), "-c", cubin]
        self.lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        found = ((OFFSET.search(line), n) for n, line in enumerate(self.lines))
        self.line_of = {int(x[1], 16): n for x, n in found if x}

    def around(self, offset: int) -> list[str]:
        """Return the instructions near an offset, and the six barriers before it and after it."""
        if offset not in self.line_of:
            return [f"no instruction at {offset:#x}"]
        at = self.line_of[offset]
        barriers = [n for n, line in enumerate(self.lines) if BARRIERS.search(line)]
        shown = {*[n for n in barriers if n < at][-6:], *[n for n in barriers if n > at][:6]}
        shown |= set(range(max(0, at - 4), min(len(self.lines), at + 5)))
        return [f"{'->' if n == at else '  '} {self.lines[n].strip()[:110]}" for n in sorted(shown)]


def check(number: int, folder: Path, seconds: float) -> str:
    """Run racecheck on one input, write its files, and return a line about it."""
    cubins = folder / f"cubins_{number}.json"
    kernels = [sys.executable, __file__, str(folder), "--input", str(number)]
    command = [tool("compute-sanitizer"), "--tool", "racecheck", "--print-limit", "100000", *kernels]
    try:
        options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds)
        text = subprocess.run(command, **options).stdout.decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        text = (error.stdout or b"").decode(errors="replace") + f"\nended after {seconds:.0f} s"
    with gzip.open(folder / f"race_{number}.log.gz", "wt") as log:
        log.write(text)
    hazards: collections.Counter = collections.Counter()
    for one, other, count in pairs_of(text):
        hazards[one, other] += count
    codes = {}
    if cubins.exists():
        codes = {name: [Code(path) for path in paths] for name, paths in json.loads(cubins.read_text()).items()}
    with open(folder / f"pairs_{number}.txt", "w") as file:
        for pair, count in hazards.most_common():
            print("\n" + " and ".join(f"{kind} at {name}+{at:#x}" for kind, name, at in pair), count, file=file)
            for kind, name, offset in pair:
                for n, code in enumerate(codes.get(name, [])):
                    print(f"  {kind} at {offset:#x}, form {n}", *code.around(offset), sep="\n  ", file=file)
    last = text.strip().splitlines()[-1:]
    return f"input {number}: {len(hazards)} pairs, {sum(hazards.values())} hazards; {last}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=300, help="time limit for all inputs together")
    parser.add_argument("--input", type=int, help="run the kernels on this input in this process, without racecheck")
    args = parser.parse_args()
    if args.input is not None:
        return run_kernels(args.input, args.folder / f"cubins_{args.input}.json")
    begun = time.time()
    for number in range(len(INPUTS)):
        left = args.seconds - (time.time() - begun)
        print(check(number, args.folder, left) if left > 5 else f"input {number}: no time left", flush=True)


if __name__ == "__main__":
    main()
