# seconds: 350
# needs: base
. scripts/offline/env.sh
export PYTHONPATH=$WORK/fla-site:$PYTHONPATH
python3 benchmarks/fla_model.py --models fla hgrn2_kernels.hf --out "$WORK/log/fla_model.json"
