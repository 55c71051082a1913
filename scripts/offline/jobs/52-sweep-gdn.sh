# seconds: 500
# needs: base data te triton
# turn
# each: gdn-hybrid gdn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
sweep "$1" 2.5e-4 5e-4 1e-3 2e-3
