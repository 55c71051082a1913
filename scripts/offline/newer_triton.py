"""Run a program with the kernels for Hopper on a Triton that is newer than dispatch.py lets run them.

python scripts/offline/newer_triton.py [-m] PROGRAM [ARGUMENT ...]
"""

import os
import runpy
import sys

from hgrn2_kernels import dispatch

dispatch.GLUON = dispatch.GLUON[0], max(dispatch.GLUON[1], dispatch.RELEASE)
del sys.argv[0]
if sys.argv[0] == "-m":
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
