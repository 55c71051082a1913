# The kernels for Hopper with a newer Triton than dispatch.py lets run them: their times, and the tests.
# seconds: 240
# needs: base triton
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$PYTHONPATH
python3 scripts/offline/newer_triton.py benchmarks/operator_times.py --out "$WORK/log/operator-triton-3.9.json"
python3 scripts/offline/newer_triton.py -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_hopper.py
