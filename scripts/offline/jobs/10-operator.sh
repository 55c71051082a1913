# seconds: 40
# needs: base
. scripts/offline/env.sh
python3 benchmarks/operator_times.py --shapes 1x32768x4 8x4096x16 --fla --out "$WORK/log/operator.json"
