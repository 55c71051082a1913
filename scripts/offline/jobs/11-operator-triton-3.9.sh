# The kernels for Hopper with a newer Triton than dispatch.py lets run them. 46 has their tests.
# seconds: 40
# needs: base triton
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$PYTHONPATH
python3 scripts/offline/newer_triton.py benchmarks/operator_times.py --shapes 1x32768x4 8x4096x16 --fla \
  --out "$WORK/log/operator-triton-3.9.json"
