# The rates 5e-4 and 1e-3 are done
# seconds: 720
# needs: base data te
# turn
. scripts/offline/env.sh
export LR=2e-3
train full hybrid 2 --iterations 2304 --lengths 2048 32768
