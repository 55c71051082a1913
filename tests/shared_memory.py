"""Find out how much shared memory the kernels want on an architecture, without a GPU and without machine code.

python tests/shared_memory.py ARCH,DTYPE,K ...      prints one JSON line for each: the most bytes that a kernel wants

Triton allocates shared memory before it makes machine code, which takes most of a compilation. So this takes seconds.
"""

import json
import os
import sys
import tempfile

# A stopped compilation leaves files without code in Triton's cache.
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()

import triton.backends.nvidia.compiler as nvidia  # noqa: E402
from compile_kernels import DTYPES, compile_kernel, recorded_launches  # noqa: E402
from triton._C.libtriton import ir, passes  # noqa: E402
from triton._C.libtriton import nvidia as libtriton  # noqa: E402


def allocate(backend, module, metadata, options, capability):
    """Take the place of the stage that makes LLVM code. It runs the passes up to the one that allocates memory."""
    manager = ir.pass_manager(module.context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    ptx_version = nvidia.get_ptx_version_from_options(options, backend.target.arch)
    libtriton.passes.ttgpuir.add_allocate_shared_memory_nv(manager, capability, ptx_version)
    manager.run(module, "allocate")
    metadata |= {f"{kind}_scratch_{what}": 0 for kind in ("global", "profile") for what in ("size", "align")}
    metadata |= {"shared": module.get_int_attr("ttg.shared"), "tmem_size": 0, "name": "none"}
    return ""


def main(cases: list[str]):
    nvidia.CUDABackend.make_llir = allocate
    nvidia.CUDABackend.make_ptx = lambda *stage: ""
    nvidia.CUDABackend.make_cubin = lambda *stage: b""
    for case in cases:
        arch, dtype, K = case.split(",")
        launches = recorded_launches(DTYPES[dtype], int(K), T=64, H=256, arch=int(arch))
        wanted = max(compile_kernel(*launch, int(arch)).metadata.shared for launch in launches)
        print(json.dumps({"case": case, "shared": wanted}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
