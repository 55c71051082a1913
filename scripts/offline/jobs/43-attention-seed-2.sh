# seconds: 830
# needs: base data te
# turn
. scripts/offline/env.sh
train full attention 2 --iterations 2304 --lengths 2048 32768
