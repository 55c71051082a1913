"""Compile every kernel for an architecture without a GPU, exactly as it would be launched.

python tests/compile_kernels.py ARCH DTYPE K        prints one JSON line per kernel: registers, stack, shared memory
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hgrn2_kernels import chunk_plan, chunk_triton
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.launch import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {torch.int8: "*i8", torch.int32: "*i32", **{dtype: f"*{name}" for name, dtype in DTYPES.items()}}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# the arguments that distinguish the variants of one kernel
FORM = ("REVERSE", "STATES", "FINAL", "DECAYS", "HAS_INITIAL", "PACKED", "TABLED", "STAGES")


def recorded_launches(
    dtype: torch.dtype, K: int, T: int, H: int, arch: int, packed: bool = False
) -> list[tuple[Launch, dict]]:
    """Return the launches of a forward and a backward with all their arguments, without launching them."""
    launches = []

    def record(launch, *tensors):
        arguments = zip(launch.jitted.arg_names, (*tensors, *launch.numbers), strict=True)
        launches.append((launch, dict(arguments)))

    q, f, v = torch.empty(1, T, H, 3, K, dtype=dtype).unbind(3)
    bound, state = torch.empty(H, K), torch.empty(1, H, K, K)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32) if packed else None
    inputs = Inputs(q, f, v, bound, state, cu_seqlens, 1.0)
    with (
        patch.object(Launch, "__call__", record),
        patch.object(chunk_plan, "capability", lambda device: divmod(arch, 10)),
    ):
        o, *_ = chunk_triton.chunk_forward(inputs)
        chunk_triton.chunk_backward(o, state, inputs)
    return launches


def compile_kernel(launch: Launch, arguments: dict, arch: int):
    """Return the kernel that Triton compiles for a launch."""
    signature, constants, attributes = {}, {}, {}
    for n, (name, parameter) in enumerate(zip(launch.jitted.arg_names, launch.jitted.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr:
            signature[name], constants[(n,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(n,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if not parameter.do_not_specialize and isinstance(value, int) and value % 16 == 0:
                attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.jitted, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": launch.num_warps})


def usage_of(compiled) -> dict[str, int]:
    """Return the registers, stack and shared memory that the machine code of a kernel uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+).*STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


def main(arch: int, dtype: str, K: int):
    seen = set()
    # one length that is cut into segments, and one with enough heads that it is not
    for T, H, packed in ((8192, 1, False), (64, 256, False), (8192, 1, True)):
        for launch, arguments in recorded_launches(DTYPES[dtype], K, T, H, arch, packed):
            form = {name: arguments[name] for name in FORM if name in arguments}
            key = (launch.jitted.__name__, *form.items())
            if key not in seen:
                seen.add(key)
                usage = usage_of(compile_kernel(launch, arguments, arch))
                print(json.dumps({"kernel": launch.jitted.__name__, **form, **usage}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
