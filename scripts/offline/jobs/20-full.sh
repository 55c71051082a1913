# Full runs that now have a loss in long documents too. A word is a model and its seed.
# seconds: 760
# needs: base data te
# turn
# each: hybrid-no-positions.1 hybrid.1 hgrn2.1
. scripts/offline/env.sh
train full "${1%.*}" "${1#*.}" --iterations 2304 --lengths 2048 32768
