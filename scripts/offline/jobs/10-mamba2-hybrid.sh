# Megatron's usual hybrid, beside the models that are done
# seconds: 1000
# needs: base data te mamba
# turn
. scripts/offline/env.sh
export PYTHONPATH=$WORK/mamba:$PYTHONPATH
train full mamba2-hybrid 2 --iterations 2304 --lengths 2048 32768
