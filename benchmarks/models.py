"""The models that the benchmarks of Megatron's loop train, and how they train them, as Megatron's flags."""

SIZE = "--num-layers 24 --hidden-size 2048 --num-attention-heads 16 --ffn-hidden-size 5632 --vocab-size 32000"
LOOP = """--mock-data --tokenizer-type NullTokenizer --untie-embeddings-and-output-weights --lr-warmup-iters 2
    --log-interval 1 --log-throughput --eval-iters 0 --eval-interval 100"""
GPU = "--bf16 --transformer-impl transformer_engine --no-gradient-accumulation-fusion"
SELECTIVE = "--recompute-granularity selective".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad".split()
BLOCK = """
    --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0
""".split()
ATTENTION, HGRN2, HYBRID, STACK = "attention", "HGRN2", "hybrid", "HybridModel"
# HybridModels with one head for multi-token prediction, which has one mixer and one MLP
ATTENTION_HEAD, HGRN2_HEAD = f"{STACK} MTP attention", f"{STACK} MTP HGRN2"
GPT_SCRIPT, STACK_SCRIPT = "pretrain_gpt.py", "pretrain_hybrid.py"


# 24 HGRN2 layers and 24 MLPs: the same function as a GPT of 24 layers
STACK_FLAGS = ["--spec", "hgrn2_stack", "--hybrid-layer-pattern"]
LAYERS = "M-" * 24
# name -> whether the launcher starts the script, the flags that make the model, and Megatron's script
MODELS = {
    ATTENTION: (False, [*BLOCK, "--position-embedding-type", "rope"], GPT_SCRIPT),
    HGRN2: (True, ["--spec", "hgrn2"], GPT_SCRIPT),
    HYBRID: (True, ["--spec", "hgrn2", "--hgrn2-layer-pattern", "HHH*"], GPT_SCRIPT),
    STACK: (True, [*STACK_FLAGS, LAYERS], STACK_SCRIPT),
    ATTENTION_HEAD: (True, [*STACK_FLAGS, f"{LAYERS}/*-"], STACK_SCRIPT),
    HGRN2_HEAD: (True, [*STACK_FLAGS, f"{LAYERS}/M-"], STACK_SCRIPT),
    "HGRN2 by two words": (
        False,
        [*BLOCK, "--position-embedding-type", "none", "--spec", "hgrn2_megatron.spec", "hgrn2"],
        GPT_SCRIPT,
    ),
}
# a width that may follow the name of a model -> its flags
WIDTHS = {
    "": [],
    "4096": "--hidden-size 4096 --num-attention-heads 32 --ffn-hidden-size 11264 --micro-batch-size 1".split()
    + SELECTIVE,
}
NAMES = [HGRN2, HYBRID, ATTENTION]
WIDE = [f"{model} 4096" for model in (HGRN2, HYBRID)]
