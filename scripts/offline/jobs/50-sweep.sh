# seconds: 250
# needs: base data te
# turn
# each: hgrn2 attention hybrid
. scripts/offline/env.sh
sweep "$1"
