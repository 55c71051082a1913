# Whether another recurrent mixer also carries the order of the tokens. The caches have what fla tunes.
# seconds: 1250
# needs: base data te triton
# turn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
train full gdn-hybrid-no-positions 2 --iterations 2304 --lengths 2048 32768
