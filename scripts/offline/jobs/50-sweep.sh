# The rates 5e-4, 1e-3 and 2e-3 are done
# seconds: 100
# needs: base data te
# turn
# each: hybrid hgrn2 attention
. scripts/offline/env.sh
sweep "$1" 2.5e-4
