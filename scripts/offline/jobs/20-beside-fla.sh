# fla's model, ours, and ours with another rounding. A last call at home compares them.
# seconds: 330
# needs: base data te
# each: ours noise
. scripts/offline/env.sh
PYTHONPATH=$PYTHONPATH:$WORK/fla-site python3 benchmarks/quality/beside_fla.py --data "$WORK/data" --runs "$1" \
  --gpus "$CUDA_VISIBLE_DEVICES" --out "$WORK/log/beside-fla" --json "$WORK/log/beside-fla.json"
