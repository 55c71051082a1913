# seconds: 260
# needs: base data te
. scripts/offline/env.sh
python3 benchmarks/quality/state_tracking.py --out "$WORK/log/state_tracking.json" --minutes 4.2
