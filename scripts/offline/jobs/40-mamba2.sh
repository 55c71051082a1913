# seconds: 1000
# needs: base data te mamba
# turn
. scripts/offline/env.sh
export PYTHONPATH=$WORK/mamba:$PYTHONPATH
train() {
  python3 benchmarks/quality/train.py mamba2 --data "$WORK/data" --out "$WORK/log/lm/full" --lr 1e-3 --seed 1 \
    --no-checkpoints --turn "$TURN" --until "$UNTIL" --iterations 2304 --lengths 2048 32768 "$@"
}
# where no iteration ran, try the form that does without causal-conv1d
train || grep -q " iteration " "$WORK"/log/lm/full/mamba2-*/piece.*.log || train -- --disable-mamba-mem-eff-path
