# seconds: 400
# needs: base data te mamba
# turn
. scripts/offline/env.sh
export PYTHONPATH=$WORK/mamba:$PYTHONPATH
sweep mamba2
