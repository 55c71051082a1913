# seconds: 740
# needs: base data te
# turn
. scripts/offline/env.sh
train full hybrid 2 --iterations 2304 --lengths 2048 32768
