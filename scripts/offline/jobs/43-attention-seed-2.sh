# seconds: 760
# needs: base data te
# turn
. scripts/offline/env.sh
python3 benchmarks/quality/train.py attention --data "$WORK/data" --out "$WORK/log/lm/full" --lr 1e-3 --seed 2 \
  --no-checkpoints --turn "$TURN" --until "$UNTIL" --iterations 2304 --lengths 2048 32768
