# What makes the runs of benchmarks/quality faster: compare losses and speed with those of plain. If something does, put its
# flags into $WORK/flags before the next run starts.
# seconds: 60
# needs: base data te
# turn
# each: plain graph loss
. scripts/offline/env.sh
case $1 in
  graph) MEGATRON="--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad" ;;
  loss) MEGATRON="--cross-entropy-fusion-impl te" ;;
esac
train "speed-$1" hgrn2 1 --iterations 100 --evaluations 1
