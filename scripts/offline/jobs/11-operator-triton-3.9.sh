# The kernels for Hopper with a newer Triton than dispatch.py lets run them: their times, and the tests.
# seconds: 240
# needs: base triton
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0
cp -r . "$WORK/newer" && cd "$WORK/newer"
sed -i 's/^GLUON = (3, 6), (3, 8)/GLUON = (3, 6), (3, 9)/' kernels/hgrn2_kernels/dispatch.py
export PYTHONPATH=$WORK/triton-3.9.0:$WORK/site:$PWD:$PWD/kernels
python3 benchmarks/operator_times.py --out "$WORK/log/operator-triton-3.9.json"
python3 -m pytest -q -m gpu -p no:cacheprovider tests/kernels/test_hopper.py
