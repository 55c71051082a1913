# The ablations are done at 1e-3
# seconds: 260
# needs: base data te
# turn
# each: hybrid hgrn2
. scripts/offline/env.sh
export LR=2e-3
train ablations "$1" 2 --iterations 768 --lengths 2048 32768
