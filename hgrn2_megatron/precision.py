"""Check what FP8 and FP4 need: a recipe that was run with HGRN2 layers, a GPU that computes it, and fitting sizes."""

from hgrn2_megatron import cpu
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.settings import Settings, refuse

# compute capability that Transformer Engine needs for each recipe that was run with HGRN2 layers
CAPABILITIES = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0)}

# The rows have the same parts as those of UNSUPPORTED in requirements.py.
UNSUPPORTED = (
    (
        lambda s: s.fp4,
        "--fp4-format",
        "give --fp8-format or --bf16, because FP4 was never run with HGRN2 layers; it needs a GPU of compute "
        "capability 10.0 or above",
    ),
    (
        lambda s: s.fp8 and _recipe(s) == "mxfp8",
        "--fp8-recipe mxfp8",
        "give delayed, tensorwise or blockwise, because MXFP8 was never run with HGRN2 layers; it needs a GPU of "
        "compute capability 10.0 or above",
    ),
    (
        lambda s: s.fp8 and _recipe(s) not in CAPABILITIES,
        "--fp8-recipe custom",
        "give delayed, tensorwise or blockwise, because a quantizer of your own was never run with HGRN2 layers",
    ),
    (
        lambda s: s.fp8 and s.transformer_impl == "local" and not cpu.installed(),
        "--fp8-format with --transformer-impl local",
        "give --transformer-impl transformer_engine, because Megatron's own layers would silently compute in bf16",
    ),
)


def check(s: Settings, capability: tuple[int, int] | None) -> None:
    """Refuse FP8 and FP4 where the layers, the GPU or the sizes of the model do not take them.

    Args:
        s: settings of this run.
        capability: compute capability of the GPU, such as (9, 0), or None on a machine without one.

    Raises:
        UsageError: something does not take the format or its recipe. The message names the flag to change.
    """
    refuse(s, UNSUPPORTED, "{} cannot be used with HGRN2 layers")
    if not s.fp8:
        return
    recipe = _recipe(s)
    needed = CAPABILITIES[recipe]
    if capability is not None and capability < needed:
        able = [f"--fp8-recipe {name}" for name, least in CAPABILITIES.items() if capability >= least]
        raise UsageError(
            f"--fp8-format {s.fp8} with --fp8-recipe {recipe} needs a GPU of compute capability "
            f"{needed[0]}.{needed[1]} or above, but this one has {capability[0]}.{capability[1]}: give "
            f"{' or '.join(able) or '--bf16 alone'}"
        )
    local = (s.hidden_size or 0) // (s.tensor_model_parallel_size or 1)
    if local % 16:
        raise UsageError(
            f"--fp8-format {s.fp8} needs a multiple of 16 channels per tensor-parallel rank, but each rank has "
            f"{local}: change --hidden-size {s.hidden_size} or --tensor-model-parallel-size "
            f"{s.tensor_model_parallel_size or 1}"
        )


def _recipe(s: Settings) -> str:
    """Return the name of the FP8 recipe, which is a str in Megatron's args and an enum in its config."""
    return getattr(s.fp8_recipe, "value", s.fp8_recipe) or "delayed"
