"""Compile every chunk kernel for an architecture without a GPU, as chunk_triton would launch it.

python tests/compile_kernels.py ARCH DTYPE K        prints one JSON line a kernel: registers, stack, shared memory
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hgrn2_kernels.chunk_gradient import chunk_gradient_kernel
from hgrn2_kernels.chunk_output import chunk_output_kernel
from hgrn2_kernels.chunk_state import chunk_state_kernel
from hgrn2_kernels.chunk_triton import Config

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32 = {"bound", "first", "last", "decays", "dbound"}


def pointer_type(name: str, config: Config, dtype: str) -> str:
    if name in FP32:
        return "*fp32"
    if name == "slow":
        return "*i8"
    if name in ("cu_seqlens", "chunk_sequence", "chunk_first"):
        return "*i32"
    if name in ("states", "dstates"):
        return "*fp32" if config.dtype == torch.float32 else "*bf16"
    return f"*{dtype}"


def compile_kernel(kernel, constexprs: dict, config: Config, dtype: str, arch: int) -> dict:
    names = kernel.arg_names
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        if name in constexprs:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("T", "NT", "NC", "SEGMENTS", "LENGTH"):
            signature[name] = "i32"
        else:
            # strides and pointers are multiples of 16 in a model, and Triton specialises on it
            signature[name] = "i32" if name.startswith("stride") else pointer_type(name, config, dtype)
            aligned[(i,)] = [["tt.divisibility", 16]]
    constants = {(names.index(name),): value for name, value in constexprs.items()}
    compiled = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": config.warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+).*STACK:(\d+)", usage).groups()
    return {"registers": int(registers), "stack": int(stack), "shared": compiled.metadata.shared}


def main(arch: int, dtype: str, K: int):
    config = Config.of(DTYPES[dtype], K, K)
    common = dict(H=16, K=K, V=K, C=config.C, BK=config.BK, DT=config.tl_dtype, BOUNDED=True, PACKED=False, FULL=True)
    levels = config.C.bit_length() - 1
    state = common | dict(BV=config.state_BV, HAS_FIRST=False, STORE=True, STAGES=config.stages)
    output = common | dict(BV=config.BV, LEVELS=levels)
    cases = [(chunk_state_kernel, state | dict(REVERSE=reverse)) for reverse in (False, True)]
    for exact in (False, True):
        form = dict(EXACT=exact, GROUP=config.group if exact else 1)
        cases += [
            (chunk_output_kernel, output | form | dict(REVERSE=False)),
            (chunk_output_kernel, output | form | dict(REVERSE=True)),
            (chunk_gradient_kernel, output | form),
        ]
    for kernel, constexprs in cases:
        form = {name: constexprs[name] for name in ("REVERSE", "EXACT") if name in constexprs}
        usage = compile_kernel(kernel, constexprs, config, dtype, arch)
        print(json.dumps({"kernel": kernel.__name__, **form, **usage}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
