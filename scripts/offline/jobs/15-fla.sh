# The slowest of the three runs, which also tunes fla's kernels
# seconds: 700
# needs: base data te
. scripts/offline/env.sh
PYTHONPATH=$PYTHONPATH:$WORK/fla-site python3 benchmarks/quality/beside_fla.py --data "$WORK/data" --runs fla \
  --gpus "$CUDA_VISIBLE_DEVICES" --out "$WORK/log/beside-fla" --json "$WORK/log/beside-fla.json"
