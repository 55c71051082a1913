# The models that have only a run with seed 1, on another build of the corpus
# seconds: 780
# needs: base data te
# turn
# each: attention hybrid
. scripts/offline/env.sh
train full "$1" 2 --iterations 2304 --lengths 2048 32768
