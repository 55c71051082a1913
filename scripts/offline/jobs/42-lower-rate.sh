# The best rate of the sweep for these models
# seconds: 720
# needs: base data te
# turn
# each: hybrid hgrn2
. scripts/offline/env.sh
export LR=5e-4
train full "$1" 2 --iterations 2304 --lengths 2048 32768
