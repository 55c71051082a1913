# Whether a CUDA graph makes the runs of benchmarks/quality faster: compare losses and speed with those of 70. If it does,
# put the flags into $WORK/flags before the next run starts.
# seconds: 60
# needs: base data te
# turn
. scripts/offline/env.sh
MEGATRON="--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad"
train graphs hgrn2 1 --iterations 100 --evaluations 1
