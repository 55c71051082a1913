"""The `--hgrn2-*` flags, the defaults that the launcher sets, and the TransformerConfig that holds the flags."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import MLATransformerConfig, TransformerConfig

from hgrn2_megatron.config import ATTENTION, LATENT_ATTENTION, LOWER_BOUNDS, HGRN2Config, UsageError

MODULE, GPT, STACK = "hgrn2_megatron.spec", "hgrn2", "hgrn2_stack"

# Megatron's attribute -> the launcher's default, which makes an HGRN2 block if the user gives no other value
SILENT = {
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-6,
    "add_bias_linear": False,
    "swiglu": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    # fill_silent sets it, because it depends on the layer pattern
    "position_embedding_type": None,
    # The mask has s x s booleans per sample. No HGRN2 layer reads it, and causal attention makes its own.
    "create_attention_mask_in_dataloader": False,
    # dtype of the recurrent states in Megatron's dynamic batching
    "mamba_inference_ssm_states_dtype": "fp32",
}
# The same block as fields of TransformerConfig, for models that are built without Megatron's command line.
_COMMON = ("normalization", "layernorm_epsilon", "add_bias_linear", "hidden_dropout", "attention_dropout")
BLOCK: dict[str, Any] = dict(gated_linear_unit=True, activation_func=F.silu, **{name: SILENT[name] for name in _COMMON})


# Megatron's attribute -> the extension of NVIDIA apex that it needs. Megatron turns these attributes on by default, and
# stops the run if the extension is missing.
EXTENSIONS = {
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    # used by Megatron's own attention in 16 bits
    "masked_softmax_fusion": "scaled_masked_softmax_cuda",
}


def silent_defaults() -> dict:
    """Return the parser's defaults for an HGRN2 run: attribute -> value if the user does not give the flag."""
    missing = {name: False for name, module in EXTENSIONS.items() if importlib.util.find_spec(module) is None}
    return SILENT | missing


@dataclasses.dataclass
class HGRN2TransformerConfig(TransformerConfig):
    """TransformerConfig with the plugin's settings as `hgrn2_*` fields. A run through the launcher builds it.

    Attributes:
        hgrn2_expand_ratio, hgrn2_layer_pattern, hgrn2_lower_bounds, hgrn2_norm_eps: see HGRN2Config.
        hgrn2_packed_layout: layout in which context-parallel ranks divide packed sequences. "documents" cuts each
            document by itself, and "stream" cuts the whole stream. None leaves the choice to Megatron's command line.
        hgrn2_loss_chunk_size: number of tokens whose logits exist at a time in training. None leaves the loss to
            Megatron.
    """

    hgrn2_expand_ratio: int = HGRN2Config.expand_ratio
    hgrn2_layer_pattern: str = HGRN2Config.layer_pattern
    hgrn2_lower_bounds: str = HGRN2Config.lower_bounds
    hgrn2_norm_eps: float = HGRN2Config.norm_eps
    hgrn2_packed_layout: str | None = None
    hgrn2_loss_chunk_size: int | None = None


@dataclasses.dataclass
class HGRN2MLATransformerConfig(MLATransformerConfig, HGRN2TransformerConfig):
    """MLATransformerConfig with the plugin's settings, for a HybridModel with multi-latent attention."""


def with_settings(config: TransformerConfig, args: argparse.Namespace) -> TransformerConfig:
    """Return the config that Megatron built from args, with the plugin's settings.

    Megatron builds an MLATransformerConfig for multi-latent attention, whatever class it is asked for. The result is
    then an HGRN2MLATransformerConfig with the same fields, which takes its `hgrn2_*` fields from the args.
    """
    if type(config) is not MLATransformerConfig:
        return config
    fields = [f.name for f in dataclasses.fields(HGRN2TransformerConfig) if f.name.startswith("hgrn2_")]
    # Megatron has completed the fields already, so they are copied as they are.
    ours = HGRN2MLATransformerConfig.__new__(HGRN2MLATransformerConfig)
    ours.__dict__.update(vars(config) | {name: getattr(args, name) for name in fields if hasattr(args, name)})
    return ours


def spec_of(argv: list[str]) -> list[str] | None:
    """Return the words of `--spec` on a command line, or None if it is not given.

    Raises:
        UsageError: the command line has `--yaml-cfg`, and the command line or the YAML file names an HGRN2 model.
            Megatron ignores all other flags beside a YAML file, and reads no spec from it.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--spec", nargs="*")
    parser.add_argument("--yaml-cfg")
    given = parser.parse_known_args(argv)[0]
    if given.yaml_cfg is not None:
        file = Path(given.yaml_cfg)
        if is_hgrn2_spec(given.spec) or (file.is_file() and "hgrn2" in file.read_text()):
            raise UsageError(
                f"--yaml-cfg {given.yaml_cfg} does not work with HGRN2, because Megatron ignores all other flags "
                "beside a YAML file, reads no spec from it, and would train attention: drop --yaml-cfg and give all "
                "flags on the command line"
            )
    return given.spec


def full_spec(spec: list[str] | None) -> list[str] | None:
    """Return a spec as checkpoints keep it: one word for an HGRN2 model becomes two. Other specs stay as given."""
    return [MODULE, *spec] if spec in ([GPT], [STACK]) else spec


def is_hgrn2_spec(spec: list[str] | None) -> bool:
    """Return whether Megatron's `args.spec`, in one word or two, names an HGRN2 model: a GPT or a HybridModel."""
    return spec is not None and full_spec(list(spec)) in ([MODULE, GPT], [MODULE, STACK])


def is_stack_spec(spec: list[str] | None) -> bool:
    """Return whether Megatron's `args.spec`, in one word or two, names the HGRN2 HybridModel."""
    return spec is not None and full_spec(list(spec)) == [MODULE, STACK]


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Register the plugin's flags. Both the launcher and a patched Megatron do so, and the second call does nothing."""
    if parser.get_default("hgrn2_expand_ratio") is not None:
        return parser
    group = parser.add_argument_group("hgrn2")
    group.add_argument(
        "--hgrn2-expand-ratio",
        type=int,
        default=HGRN2Config.expand_ratio,
        help="number of key and gate channels per head; an HGRN2 layer has hidden_size / expand_ratio heads "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--hgrn2-layer-pattern",
        default=HGRN2Config.layer_pattern,
        help="layers of a GPT: H is an HGRN2 layer and * an attention layer; the pattern, for example 'HHH*', repeats "
        "over the depth of the model (default: %(default)s)",
    )
    group.add_argument(
        "--hgrn2-lower-bounds",
        choices=LOWER_BOUNDS,
        default=HGRN2Config.lower_bounds,
        help="lower bounds of the forget gates: 'learned' gives each layer its own learned bounds, 'none' trains "
        "without bounds (default: %(default)s)",
    )
    group.add_argument(
        "--hgrn2-norm-eps",
        type=float,
        default=HGRN2Config.norm_eps,
        help="epsilon of the RMSNorm inside the HGRN2 mixer; --norm-epsilon sets the epsilon of all other norms "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--hgrn2-loss-chunk-size",
        type=int,
        metavar="TOKENS",
        help="compute the output layer and the cross-entropy in chunks of this many of a rank's tokens, so that only "
        "one chunk's logits exist at a time; by default Megatron computes the logits of the whole micro-batch at once",
    )
    return parser


def glu_width(hidden_size: int, ratio: int = 4) -> int:
    """Return the width of the gated channel mixer, rounded up to a multiple of 256.

    At this width its three matrices have about as many parameters as the two matrices of an MLP of width
    `ratio * hidden_size`.

    Source: fla's HGRN2MLP.
    """
    return 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)


def fill_silent(args: argparse.Namespace):
    """Set the defaults that depend on other flags.

    They are the position embedding, the width of the channel mixer, and multi-latent attention if the pattern has it.
    """
    if is_stack_spec(args.spec) and LATENT_ATTENTION in (args.hybrid_layer_pattern or ""):
        args.multi_latent_attention = True
    if args.position_embedding_type is None:
        pattern = getattr(args, "hybrid_layer_pattern", None) or args.hgrn2_layer_pattern
        args.position_embedding_type = "rope" if ATTENTION in pattern else "none"
    if args.ffn_hidden_size is None and args.hidden_size is not None:
        args.ffn_hidden_size = glu_width(args.hidden_size)
    # Megatron's tools/run_text_generation_server.py reads this name, which no flag sets
    args.inference_max_sequence_length = getattr(args, "inference_max_seq_length", None)
    if is_stack_spec(args.spec) and hasattr(args, "model_provider"):
        # Megatron's programs for inference build a GPT by default
        args.model_provider = "hybrid"
