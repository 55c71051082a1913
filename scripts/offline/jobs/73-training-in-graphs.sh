# Whether CUDA graphs make the runs of benchmarks/quality faster: compare losses and speed with those of 72. If they do,
# put the flags into $WORK/flags before the next run starts.
# seconds: 60
# needs: base data te
# turn
. scripts/offline/env.sh
cd "$WORK/graphs" || exit 1
MEGATRON="--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
train graphs hgrn2 1 --iterations 100 --evaluations 1
