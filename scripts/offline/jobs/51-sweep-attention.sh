# seconds: 250
# needs: base data te
# turn
. scripts/offline/env.sh
sweep attention
