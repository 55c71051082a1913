# FP8 is 1.25 times as fast as bf16 because the GPU waits for the host. Here each layer is a CUDA graph.
# seconds: 130
# needs: base te
. scripts/offline/env.sh
for flags in "" "--fp8-format hybrid --fp8-recipe delayed"; do
  name=graphs${flags:+-fp8}
  # shellcheck disable=SC2086
  python3 benchmarks/pretrain.py examples --rows "HGRN2, 4096" --logs "$WORK/log/$name" --out "$WORK/log/$name.json" \
    -- --cuda-graph-impl local $flags
done
