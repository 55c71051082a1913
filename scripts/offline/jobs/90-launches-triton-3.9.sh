# Whether launch.py may start kernels of Triton 3.9 as it starts those of 3.8: then add the hash that this prints.
# seconds: 150
# needs: base data te triton
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$PYTHONPATH
python3 - <<'PROGRAM'
import sys

import pytest
from triton.backends.nvidia.driver import CudaLauncher

from hgrn2_kernels import launch

launch.LAUNCHER_3_8 = launch.source_hash(CudaLauncher)
print(launch.LAUNCHER_3_8)
sys.exit(pytest.main(["-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/kernels/test_hopper.py"]))
PROGRAM
