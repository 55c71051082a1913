# The hybrid without positions in full
# seconds: 720
# needs: base data te
# turn
# each: 2
. scripts/offline/env.sh
train full hybrid-no-positions "$1" --iterations 2304 --lengths 2048 32768
