# What the hybrids of 16 layers are compared with. A word is a model and its seed.
# seconds: 280
# needs: base data te
# turn
# each: hybrid-no-positions.2 attention.1 hgrn2.1 attention.2 hgrn2.2
. scripts/offline/env.sh
train ratios "${1%.*}" "${1#*.}" --size 100m --iterations 768 --lengths 2048 32768
