# seconds: 190
# needs: base data te
# turn
. scripts/offline/env.sh
python3 benchmarks/quality/train.py hgrn2 --data "$WORK/data" --out "$WORK/log/lm/sweep" --lr 1e-3 --seed 1 \
  --no-checkpoints --turn "$TURN" --until "$UNTIL" --iterations 384 --evaluations 4
