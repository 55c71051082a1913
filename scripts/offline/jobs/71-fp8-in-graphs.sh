# FP8 was 1.25 times as fast as bf16, and the GPU waited for the host. In a graph of the iteration it does not wait.
# seconds: 200
# needs: base te
. scripts/offline/env.sh
cd "$WORK/graphs" || exit 1
fp8="--fp8-format hybrid --fp8-recipe delayed"
python3 benchmarks/pretrain.py examples --rows "HGRN2, 4096" "HGRN2, 4096 graph" --logs "$WORK/log/graphs" \
  --out "$WORK/log/graphs.json"
# shellcheck disable=SC2086
python3 benchmarks/pretrain.py examples --rows "HGRN2, 4096 graph" --logs "$WORK/log/graphs-fp8" \
  --out "$WORK/log/graphs-fp8.json" -- $fp8
