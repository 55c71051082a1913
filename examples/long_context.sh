#!/bin/sh
# Train HGRN2 on sequences that are too long for one GPU. Each GPU holds a shard of every sequence. Context parallelism
# passes the recurrent states between the GPUs, and no tokens.
#
#   MEGATRON_LM=<checkout> sh examples/long_context.sh [more Megatron flags]      128K tokens per sequence on two GPUs
#   GPUS=8 SEQ=1048576 ...                                                        1M tokens on eight GPUs of one node
#   NODES=8 NODE_RANK=<0..7> MASTER_ADDR=<node 0> GPUS=8 SEQ=4194304 ...          4M tokens on 64 GPUs; start it on each node
#
# The model has 24 HGRN2 layers (M) and 24 MLPs (-). PATTERN='M-M-M-*-' makes every fourth mixer an attention layer (*).
# The ranks of attention layers exchange keys and values (--cp-comm-type). DATA=<prefix> replaces the mock data with a
# dataset that examples/prepare_bytes.py or Megatron's preprocess_data.py wrote. Recompute keeps the input of every second
# layer, so one input for each mixer and its MLP.
set -eu
: "${MEGATRON_LM:?set it to a Megatron-LM checkout}"
GPUS=${GPUS:-2} NODES=${NODES:-1} SEQ=${SEQ:-131072} PATTERN=${PATTERN:-M-}
export CUDA_DEVICE_MAX_CONNECTIONS=1
# a long sequence makes tensors of many sizes, and each takes a large part of the memory
export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
layers=$PATTERN
while [ ${#layers} -lt 48 ]; do layers=$layers$PATTERN; done
data="--mock-data"
[ -z "${DATA:-}" ] || data="--data-path $DATA --split 99,1,0"
# $data is split into words, one for each flag
# shellcheck disable=SC2086
exec torchrun --nproc_per_node "$GPUS" --nnodes "$NODES" --node_rank "${NODE_RANK:-0}" \
    --master_addr "${MASTER_ADDR:-localhost}" --master_port "${MASTER_PORT:-29500}" \
    -m hgrn2_megatron "$MEGATRON_LM/pretrain_hybrid.py" --spec hgrn2_stack --hybrid-layer-pattern "$layers" \
    --context-parallel-size $((GPUS * NODES)) --seq-length "$SEQ" --max-position-embeddings "$SEQ" \
    --micro-batch-size 1 --global-batch-size 1 \
    --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 \
    --untie-embeddings-and-output-weights --bf16 --transformer-impl transformer_engine \
    --recompute-granularity full --recompute-method uniform --recompute-num-layers 2 \
    --hgrn2-loss-chunk-size 8192 \
    --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather \
    --empty-unused-memory-level 1 \
    $data --tokenizer-type NullTokenizer --vocab-size 32000 \
    --train-iters 20 --lr 3e-4 --lr-warmup-iters 2 --log-interval 1 --eval-iters 0 --eval-interval 1000 "$@"
