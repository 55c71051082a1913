"""The `--hgrn2-*` flags, the values the launcher sets where the user is silent, and the typed config they ride on."""

import argparse
import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from hgrn2_megatron.config import ATTENTION, LOWER_BOUNDS, HGRN2Config, UsageError

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
