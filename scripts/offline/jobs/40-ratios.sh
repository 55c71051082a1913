# Hybrids of 16 layers, which can have seven HGRN2 layers for each attention layer
# seconds: 240
# needs: base data te
# turn
# each: hybrid-7-1 hybrid hybrid-1-1 attention hgrn2
. scripts/offline/env.sh
train ratios "$1" 1 --size 100m --iterations 768 --lengths 2048 32768
