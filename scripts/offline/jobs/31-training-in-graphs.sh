# Whether CUDA graphs make the runs of benchmarks/quality faster: compare the seconds of an iteration with 0.28.
# seconds: 70
# needs: base data te
# turn
. scripts/offline/env.sh
train graphs hgrn2 1 --iterations 100 --evaluations 1 -- --cuda-graph-impl local
