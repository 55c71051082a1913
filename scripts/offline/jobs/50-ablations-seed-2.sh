# The models of the ablations that have one seed
# seconds: 240
# needs: base data te
# turn
# each: hgrn2-expand-64 hybrid-5-1 hgrn2-expand-32 hgrn2-expand-16
. scripts/offline/env.sh
train ablations "$1" 2 --iterations 768 --lengths 2048 32768
