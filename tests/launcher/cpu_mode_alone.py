"""Run a script under the CPU mode and without the launcher: what a patched Megatron does on a machine without a GPU.

For torchrun, with the script's path and its command line; not a test.
"""

import runpy
import sys

from hgrn2_megatron import cpu

cpu.install()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
