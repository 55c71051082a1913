# The caches have what fla tunes. Without them it takes up to 260 seconds more.
# seconds: 1130
# needs: base data te triton
# turn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
train full gdn-hybrid 2 --iterations 2304 --lengths 2048 32768
