# The other models are done. The caches have what fla tunes.
# seconds: 580
# needs: base data te triton
# turn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
sweep gdn 2.5e-4 5e-4 1e-3 2e-3
