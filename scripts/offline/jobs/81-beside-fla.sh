# Two runs of our model and one of fla's, one after the other
# seconds: 1150
# needs: base data te
. scripts/offline/env.sh
PYTHONPATH=$PYTHONPATH:$WORK/fla-site python3 benchmarks/quality/beside_fla.py --data "$WORK/data" \
  --gpus "$CUDA_VISIBLE_DEVICES" --out "$WORK/log/beside-fla" --json "$WORK/log/beside-fla.json"
