# A larger state, and another base of the rotary positions
# seconds: 240
# needs: base data te
# turn
# each: hgrn2-expand-256 hybrid-rotary-base
. scripts/offline/env.sh
train ablations "$1" 2 --iterations 768 --lengths 2048 32768
