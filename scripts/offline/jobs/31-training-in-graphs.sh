# Whether CUDA graphs make the runs of benchmarks/quality faster: compare the seconds of an iteration with 0.28.
# seconds: 70
# needs: base data te
# turn
. scripts/offline/env.sh
python3 benchmarks/quality/train.py hgrn2 --data "$WORK/data" --out "$WORK/log/lm/graphs" --lr 1e-3 --seed 1 \
  --no-checkpoints --turn "$TURN" --until "$UNTIL" --iterations 100 --evaluations 1 -- --cuda-graph-impl local
