# seconds: 60
# needs: base data te
# turn
. scripts/offline/env.sh
train plain hgrn2 1 --iterations 100 --evaluations 1
