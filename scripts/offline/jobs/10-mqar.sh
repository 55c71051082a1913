# Recall of attention of width 512, in the time until the text is there
# seconds: 95
# needs: base
. scripts/offline/env.sh
python3 benchmarks/quality/mqar.py --widths 512 --patterns "*" --expand-ratios 128 --seeds 1 --rates 1e-3 3e-3 \
  --workers 1 --minutes 1.5 --out "$WORK/log/mqar-512.json"
