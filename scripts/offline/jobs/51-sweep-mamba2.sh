# seconds: 450
# needs: base data te mamba
# turn
. scripts/offline/env.sh
export PYTHONPATH=$WORK/mamba:$PYTHONPATH
sweep mamba2 2.5e-4 5e-4 1e-3 2e-3
