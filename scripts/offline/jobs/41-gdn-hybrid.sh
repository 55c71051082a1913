# seconds: 900
# needs: base data te triton
# turn
. scripts/offline/env.sh
export TRITON_CACHE_DIR=$WORK/cache-3.9.0 PYTHONPATH=$WORK/triton-3.9.0:$WORK/fla-site:$PYTHONPATH
python3 benchmarks/quality/train.py gdn-hybrid --data "$WORK/data" --out "$WORK/log/lm/full" --lr 1e-3 --seed 1 \
  --no-checkpoints --turn "$TURN" --until "$UNTIL" --iterations 2304 --lengths 2048 32768
