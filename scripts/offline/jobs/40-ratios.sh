# Hybrids of 16 layers, which can have seven HGRN2 layers for each attention layer. A word is a model and its seed.
# seconds: 240
# needs: base data te
# turn
# each: hybrid-7-1.1 hybrid.1 hybrid-no-positions.1 hybrid-7-1.2 hybrid.2
. scripts/offline/env.sh
train ratios "${1%.*}" "${1#*.}" --size 100m --iterations 768 --lengths 2048 32768
