# Needles with more steps and lower rates, in the time until the text is there and beyond
# seconds: 700
# needs: base
. scripts/offline/env.sh
python3 benchmarks/quality/needle.py --rates 1.25e-4 2.5e-4 5e-4 --steps 6000 --minutes 11.5 --out "$WORK/log/needle.json"
