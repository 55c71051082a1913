# seconds: 360
# needs: base data te
. scripts/offline/env.sh
python3 benchmarks/quality/needle.py --out "$WORK/log/needle.json" --minutes 5.8
