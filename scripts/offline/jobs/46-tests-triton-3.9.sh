# seconds: 180
# needs: base triton
# beside
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$PYTHONPATH
python3 scripts/offline/newer_triton.py -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_hopper.py
