# For how long of an iteration the GPU of a run of benchmarks/quality waits.
# seconds: 60
# needs: base data te
# turn
. scripts/offline/env.sh
traces=$WORK/log/lm/profile/traces
train profile hgrn2 1 --iterations 50 --evaluations 1 -- --profile --use-pytorch-profiler --profile-step-start 40 \
  --profile-step-end 42 --profile-ranks 0 --tensorboard-dir "$traces/tensorboard"
PYTHONPATH=benchmarks:$PYTHONPATH python3 -c \
  "import pathlib, sys, pretrain; print(pretrain.kernel_table(pathlib.Path(sys.argv[1])))" "$traces"
rm -r "$traces"
