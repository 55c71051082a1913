# The second seed of job 30
# seconds: 240
# needs: base data te
# turn
# each: hgrn2 hybrid hybrid-no-positions hgrn2-no-bounds hybrid-1-1 hybrid-5-1 hgrn2-expand-16 hgrn2-expand-32 hgrn2-expand-64
. scripts/offline/env.sh
train ablations "$1" 2 --iterations 768 --lengths 2048 32768
