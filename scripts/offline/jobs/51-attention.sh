# seconds: 130
# needs: base data te
# turn
. scripts/offline/env.sh
train sweep attention 1 --iterations 384 --evaluations 4
