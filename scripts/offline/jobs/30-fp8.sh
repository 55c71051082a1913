# seconds: 200
# needs: base te
. scripts/offline/env.sh
python3 benchmarks/pretrain.py examples --rows "HGRN2, 4096" "HGRN2, 4096 FP8" --profile --logs "$WORK/log/fp8" \
  --out "$WORK/log/fp8.json"
# the traces behind the tables are large
find "$WORK/log/fp8" -name "*.json*" -delete
