# A second seed, another base of the rotary positions, and a larger state
# seconds: 290
# needs: base data te
# turn
# each: hgrn2-expand-16 hybrid-rotary-base hgrn2-expand-256
. scripts/offline/env.sh
train ablations "$1" 2 --iterations 768 --lengths 2048 32768
