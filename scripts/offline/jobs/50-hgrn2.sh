# seconds: 130
# needs: base data te
# turn
. scripts/offline/env.sh
train sweep hgrn2 1 --iterations 384 --evaluations 4
