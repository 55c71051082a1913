# seconds: 1150
# needs: base data te mamba
# turn
. scripts/offline/env.sh
export PYTHONPATH=$WORK/mamba:$PYTHONPATH
mamba2() { train full mamba2 2 --iterations 2304 --lengths 2048 32768 "$@"; }
# where no iteration ran, try the form that does without causal-conv1d
mamba2 || grep -q " iteration " "$WORK"/log/lm/full/mamba2-*/piece.*.log || MEGATRON=--disable-mamba-mem-eff-path mamba2
