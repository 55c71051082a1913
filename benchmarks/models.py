"""What the benchmarks of Megatron's loop train, and ways to do it, as its flags."""

BLOCK = """
    --normalization RMSNorm --norm-epsilon 1e-6 --disable-bias-linear --swiglu
    --hidden-dropout 0 --attention-dropout 0
""".split()
ATTENTION, HGRN2, HYBRID = "attention", "HGRN2", "hybrid"
# name -> (whether through the launcher, the flags that make the model)
MODELS = {
    ATTENTION: (False, [*BLOCK, "--position-embedding-type", "rope"]),
    HGRN2: (True, ["--spec", "hgrn2"]),
    HYBRID: (True, ["--spec", "hgrn2", "--hgrn2-layer-pattern", "HHH*"]),
    "HGRN2 by two words": (
        False,
        [*BLOCK, "--position-embedding-type", "none", "--spec", "hgrn2_megatron.spec", "hgrn2"],
    ),
}
SELECTIVE = "--recompute-granularity selective".split()
FULL = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1".split()
GRAPH = "--cuda-graph-impl full_iteration --no-check-for-nan-in-loss-and-grad".split()
