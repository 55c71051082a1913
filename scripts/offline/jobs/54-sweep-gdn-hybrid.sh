# seconds: 380
# needs: base data te triton
# turn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
sweep gdn-hybrid
