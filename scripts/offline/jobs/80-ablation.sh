# Half as many tokens as in the full runs
# seconds: 420
# needs: base data te
# turn
# each: hgrn2 hgrn2-no-bounds hgrn2-expand-16 hgrn2-expand-32 hgrn2-expand-64 hybrid hybrid-1-1 hybrid-5-1
. scripts/offline/env.sh
train ablations "$1" 1 --iterations 1152
