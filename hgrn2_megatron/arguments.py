"""The `--hgrn2-*` flags, the values the launcher sets where the user is silent, and the typed config they ride on."""

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from hgrn2_megatron.config import ATTENTION, HGRN2, LOWER_BOUNDS, PIPE, HGRN2Config, UsageError, stages_fit

MODULE, GPT, STACK = "hgrn2_megatron.spec", "hgrn2", "hgrn2_stack"

# Megatron's attribute -> the value of a true HGRN2 block
SILENT = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "add_bias_linear": False,
    "swiglu": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # decided once the layer pattern is known
    "position_embedding_type": None,
    # s x s booleans a sample, which no HGRN2 layer reads and causal attention makes for itself
    "create_attention_mask_in_dataloader": False,
    # of the states in Megatron's dynamic batching
    "mamba_inference_ssm_states_dtype": "fp32",
}
# the block as TransformerConfig has it, for models that are built without Megatron's command line
_COMMON = ("normalization", "layernorm_epsilon", "add_bias_linear", "hidden_dropout", "attention_dropout")
BLOCK: dict[str, Any] = dict(gated_linear_unit=True, activation_func=F.silu, **{name: SILENT[name] for name in _COMMON})


# Megatron's attribute -> the extension of NVIDIA apex without which its default stops a run
EXTENSIONS = {
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    # in attention of Megatron's own in 16 bits
    "masked_softmax_fusion": "scaled_masked_softmax_cuda",
}


def silent_defaults() -> dict:
    """Parser defaults of an HGRN2 run: attribute -> value where the user gives no flag."""
    missing = {name: False for name, module in EXTENSIONS.items() if importlib.util.find_spec(module) is None}
    return SILENT | missing


# what a checkpoint says of its model, beside what Megatron itself restores
CHECKPOINT_ARGS = tuple(f"hgrn2_{f.name}" for f in dataclasses.fields(HGRN2Config)) + ("layernorm_epsilon",)


@dataclasses.dataclass
class HGRN2TransformerConfig(TransformerConfig):
    """TransformerConfig with the `hgrn2_*` fields of HGRN2Config, as the launcher builds it.

    Attributes:
        hgrn2_packed_layout: how packed sequences are dealt out to context parallel ranks, "documents" or "stream";
            None where Megatron's command line says so.
        hgrn2_loss_chunk_size: tokens whose logits exist at a time in training; None for Megatron's own loss.
    """

    hgrn2_expand_ratio: int = HGRN2Config.expand_ratio
    hgrn2_layer_pattern: str = HGRN2Config.layer_pattern
    hgrn2_lower_bounds: str = HGRN2Config.lower_bounds
    hgrn2_norm_eps: float = HGRN2Config.norm_eps
    hgrn2_packed_layout: str | None = None
    hgrn2_loss_chunk_size: int | None = None


def spec_of(argv: list[str]) -> list[str] | None:
    """The words of `--spec` on a command line, None where it is not given.

    Raises:
        UsageError: there is a YAML file too, and an HGRN2 model in either: Megatron then drops all other flags, and
            takes no spec from the file.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--yaml-cfg")
    given = parser.parse_known_args(argv)[0]
    if given.yaml_cfg is not None:
        file = Path(given.yaml_cfg)
        if is_hgrn2_spec(given.spec) or (file.is_file() and "hgrn2" in file.read_text()):
            raise UsageError(
                f"--yaml-cfg {given.yaml_cfg}: Megatron drops every flag beside a YAML file, takes no spec from it and "
                "would train attention; give all flags on the command line"
            )
    return given.spec


def full_spec(spec: list[str] | None) -> list[str] | None:
    """A spec as checkpoints keep it: the two words for which the one word of an HGRN2 model stands, others as is."""
    return [MODULE, *spec] if spec in ([GPT], [STACK]) else spec


def is_hgrn2_spec(spec: list[str] | None) -> bool:
    """Whether Megatron's `args.spec`, of one word or two, names an HGRN2 model, a GPT or a HybridModel."""
    return spec is not None and full_spec(list(spec)) in ([MODULE, GPT], [MODULE, STACK])


def is_stack_spec(spec: list[str] | None) -> bool:
    """Whether Megatron's `args.spec`, of one word or two, names the HGRN2 HybridModel."""
    return spec is not None and full_spec(list(spec)) == [MODULE, STACK]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register the plugin's flags, once: the launcher and a patched Megatron both do."""
    if parser.get_default("hgrn2_expand_ratio") is not None:
        return parser
    group = parser.add_argument_group("hgrn2")
    group.add_argument(
        "--hgrn2-expand-ratio",
        type=int,
        default=HGRN2Config.expand_ratio,
        help="key and gate dimension of a head; the model has hidden_size / expand_ratio heads",
    )
    group.add_argument(
        "--hgrn2-layer-pattern",
        default=HGRN2Config.layer_pattern,
        help="H (HGRN2) and * (attention), repeated over the depth of the model, for example 'HHH*'",
    )
    group.add_argument(
        "--hgrn2-lower-bounds",
        choices=LOWER_BOUNDS,
        default=HGRN2Config.lower_bounds,
        help="lower bounds of the forget gates: learned over depth, or none",
    )
    group.add_argument(
        "--hgrn2-norm-eps",
        type=float,
        default=HGRN2Config.norm_eps,
        help="epsilon of the RMSNorm inside the HGRN2 mixer; --norm-epsilon is that of the block's norms",
    )
    group.add_argument(
        "--hgrn2-loss-chunk-size",
        type=int,
        metavar="TOKENS",
        help="compute output layer and cross-entropy by chunks of so many of a rank's tokens, so that the logits of no "
        "more exist at a time; without it Megatron makes those of the whole micro-batch",
    )
    return parser


def glu_width(hidden_size: int, ratio: int = 4) -> int:
    """Width of the channel mixer that has the parameters of an MLP of `ratio` hidden sizes, a multiple of 256.

    Source: fla's HGRN2MLP.
    """
    return 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)


def fill_silent(args: argparse.Namespace):
    """Settle what depends on other flags: positions on the layer pattern, GLU width on the hidden size."""
    if args.position_embedding_type is None:
        pattern = getattr(args, "hybrid_layer_pattern", None) or args.hgrn2_layer_pattern
        args.position_embedding_type = "rope" if ATTENTION in pattern else "none"
    if args.ffn_hidden_size is None and args.hidden_size is not None:
        args.ffn_hidden_size = glu_width(args.hidden_size)
    # Megatron's tools/run_text_generation_server.py asks for the flag under a name that it does not have
    args.inference_max_sequence_length = getattr(args, "inference_max_seq_length", None)


def restore(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Take the model's own flags from a checkpoint's args, as --use-checkpoint-args does for Megatron's.

    Megatron has put the checkpoint's spec and, where the command line has none, its layer pattern into args by now. The
    stages in that pattern are those of the run that saved.

    Raises:
        UsageError: the checkpoint's spec is another than this run's.
    """
    if not is_hgrn2_spec(args.spec):
        raise UsageError(f"--use-checkpoint-args: the checkpoint is of --spec {' '.join(args.spec)}; drop the flag")
    asked = spec_of(sys.argv[1:])
    if asked is not None:
        _refuse_other_form(asked, args.spec)
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern and not stages_fit(pattern, args.pipeline_model_parallel_size):
        args.hybrid_layer_pattern = pattern.replace(PIPE, "")
    # every run through the launcher saves the plugin's flags; they mean something where the model is HGRN2
    ours = is_hgrn2_spec(getattr(checkpoint_args, "spec", None))
    for name in CHECKPOINT_ARGS if ours else ("layernorm_epsilon",):
        if hasattr(checkpoint_args, name):
            setattr(args, name, getattr(checkpoint_args, name))


def _refuse_other_form(ours: list[str], theirs: list[str]):
    """Refuse a checkpoint of a GPT for a HybridModel, and the other way round.

    Args:
        ours: this run's spec, of an HGRN2 model.
        theirs: the checkpoint's, likewise.

    Raises:
        UsageError: it says which script takes the checkpoint.
    """
    stack = is_stack_spec(theirs)
    if is_stack_spec(ours) == stack:
        return
    script, spec, model = ("pretrain_hybrid.py", STACK, "HybridModel") if stack else ("pretrain_gpt.py", GPT, "GPT")
    here, there = (" ".join(full_spec(list(spec)) or ()) for spec in (ours, theirs))
    raise UsageError(
        f"--spec is {here} here and {there} in the checkpoint to load: weights of a {model} have other names, so "
        f"run {script} with --spec {spec} and --use-checkpoint-args, or train without --load"
    )


def check_same_model(args: argparse.Namespace, checkpoint_args: argparse.Namespace):
    """Compare two HGRN2 models: what decides the meaning and the names of the weights, before they are loaded.

    Megatron would read a checkpoint of other heads without a word, as their projections have the same shapes, and
    end in a list of weights that are missing where the depth or the pattern differs.

    Raises:
        UsageError: the checkpoint is of another model; it names the flag.
    """
    _refuse_other_form(args.spec, checkpoint_args.spec)
    ours, theirs = HGRN2Config.of(args), HGRN2Config.of(checkpoint_args)
    pairs: dict[str, tuple] = {}
    if is_stack_spec(args.spec):
        pairs["--hybrid-layer-pattern"] = (_symbols(args), _symbols(checkpoint_args))
    else:
        depth = args.num_layers
        pairs["--num-layers"] = (depth, checkpoint_args.num_layers)
        pairs["--hgrn2-layer-pattern"] = (_letters(ours, depth), _letters(theirs, depth))
    pairs["--hgrn2-expand-ratio"] = (ours.expand_ratio, theirs.expand_ratio)
    pairs["--hgrn2-lower-bounds"] = (ours.lower_bounds, theirs.lower_bounds)
    refuse_differences(
        pairs, "give what the checkpoint has, drop the flag and add --use-checkpoint-args, or train without --load"
    )


def _letters(config: HGRN2Config, depth: int) -> str:
    return "".join(HGRN2 if config.is_hgrn2_layer(layer) else ATTENTION for layer in range(depth))


def _symbols(args: argparse.Namespace) -> str:
    """A HybridModel's layers; where stages divide them is no part of the model."""
    return (getattr(args, "hybrid_layer_pattern", None) or "").replace(PIPE, "")


def refuse_differences(pairs: dict, instead: str):
    """Refuse the first difference between this run and a checkpoint.

    Args:
        pairs: flag -> its value (here, in the checkpoint).
        instead: what to do.

    Raises:
        UsageError: it names the flag.
    """
    for flag, (given, saved) in pairs.items():
        if given != saved:
            raise UsageError(f"{flag} is {given} here and {saved} in the checkpoint to load: {instead}")
