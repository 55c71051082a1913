# seconds: 60
# needs: base
. scripts/offline/env.sh
python3 benchmarks/operator_times.py --out "$WORK/log/operator.json"
