"""Compile every form of the kernels for Hopper without a GPU, exactly as they would be launched.

python tests/compile_hopper.py      prints one JSON line per kernel and form: registers, spilled bytes, shared memory
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import compile_for_gpu  # noqa: E402, before triton
import torch  # noqa: E402
from compile_kernels import CUOBJDUMP, FORM  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from hgrn2_kernels.inputs import Inputs  # noqa: E402

FORMS = {
    # batch, length, heads, number of packed sequences, whether there is a state in and out, or rows of one; a bound
    "whole": (8, 4096, 16, None, False, True),
    "with a state": (8, 4096, 16, None, True, True),
    "odd": (8, 4095, 16, None, True, True),
    "cut": (1, 32768, 16, None, False, True),
    "packed": (1, 4096, 64, 5, "rows", True),
    "packed and cut": (1, 32768, 4, 2, False, True),
    "without a bound": (8, 4096, 16, None, True, False),
}


def run_all(hopper):
    for B, T, H, N, has_state, bounded in FORMS.values():
        q, f, v = torch.empty(B, T, H, 3, 128, dtype=torch.bfloat16, device="cuda").unbind(3)
        bound = torch.empty(H, 128, device="cuda") if bounded else None
        cu_seqlens = None if N is None else torch.empty(N + 1, dtype=torch.int32, device="cuda")
        state = torch.empty(N or B, H, 128, 128, device="cuda") if has_state else None
        if has_state == "rows":
            run_with_rows(hopper.HopperLaunches(q, f, v, bound, 1.0, cu_seqlens), v, state)
            continue
        inputs = Inputs(q, f, v, bound, state, cu_seqlens, 1.0)
        o, _, saved = hopper.chunk_forward(inputs, has_state, True)
        hopper.chunk_backward(torch.empty_like(o), state, inputs, saved)


def run_with_rows(run, v, state):
    """Run forward and backward as sharded_triton.py does."""
    rows = torch.empty(len(state), dtype=torch.int32, device="cuda")
    o, dq, df, dv = (torch.empty_like(v) for _ in range(4))
    states, *_ = run.run_forward(v, state, o, False, rows)
    run.run_backward(v, o, states, state, dq, df, dv, False, rows)


def usage(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+).*STACK:(\d+)", text).groups()
    return dict(registers=int(registers), stack=int(stack), shared=compiled.metadata.shared)


def main():
    seen = set()
    launch = JITFunction.run

    def run(self, *args, **options):
        compiled = launch(self, *args, **options)
        name = self.__name__
        given = dict(zip(self.arg_names, args, strict=True)) | options
        form = {x: given[x] for x in (*FORM, "ROWS", "BOUNDED", "FULL") if x in given}
        if (name, *form.items()) not in seen:
            seen.add((name, *form.items()))
            print(json.dumps({"kernel": name, **form, **usage(compiled)}), flush=True)
        return compiled

    JITFunction.run = run
    compile_for_gpu.pretend(90)
    from hgrn2_kernels import chunk_plan, hopper
    from hgrn2_kernels.launch import Launch

    every = Launch.__call__
    beyond = set()

    def call(self, *tensors, **descriptors):
        # The kernels for chunks beyond the limit are compiled for dense batches only. compile_kernels.py compiles the
        # kernels of chunk_triton.py.
        name = self.jitted.__name__
        given = dict(zip(reversed(self.jitted.arg_names), reversed(self.numbers), strict=False))
        form = name, given.get("REVERSE"), given.get("FORM")
        if name.startswith("hopper") or name.startswith("beyond") and form not in beyond:
            beyond.add(form)
            every(self, *tensors, **descriptors)

    with (
        compile_for_gpu.Shapes(),
        patch.object(chunk_plan, "capability", lambda device: (9, 0)),
        patch.object(Launch, "__call__", call),
    ):
        run_all(hopper)


if __name__ == "__main__":
    main()
