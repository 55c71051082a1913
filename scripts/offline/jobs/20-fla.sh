# seconds: 300
# needs: base
. scripts/offline/env.sh
export PYTHONPATH=$WORK/fla-site:$PYTHONPATH
python3 benchmarks/fla_model.py --models fla hgrn2_kernels.hf "with the operator" --out "$WORK/log/fla_model.json"
