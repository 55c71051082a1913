# Recall of models of width 512, in the time until the text is there: one kind on each GPU.
# seconds: 95
# needs: base
# each: 1 2 3
. scripts/offline/env.sh
[ "$(nvidia-smi -L | wc -l)" -ge "$1" ] || exit 0
case $1 in
  1) pattern="H" expand=32 ;;
  2) pattern="H*" expand=128 ;;
  3) pattern="*" expand=128 ;;
esac
python3 benchmarks/quality/mqar.py --widths 512 --patterns "$pattern" --expand-ratios $expand --seeds 1 \
  --rates 1e-3 3e-3 --workers 1 --minutes 1.5 --out "$WORK/log/mqar-512-$1.json"
