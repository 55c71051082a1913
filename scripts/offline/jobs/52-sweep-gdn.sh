# seconds: 450
# needs: base data te triton
# turn
# each: gdn-hybrid gdn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
sweep "$1"
