"""Table of a model's weights: their names, shapes and order of rows in Megatron and in fla's format on Hugging Face.

docs/guides/conversion.md has the same table for readers.

Source: fla-org/flash-linear-attention 0.6.0, fla/models/hgrn2 and fla/layers/{hgrn2,attn}.py.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hgrn2_megatron.arguments import is_stack_spec
from hgrn2_megatron.config import HGRN2Config, query_groups
from hgrn2_megatron.conversion.config import as_gpt
from hgrn2_megatron.forms import stack_name


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a Megatron checkpoint, and the tensors of fla that it consists of.

    Its rows are divided into groups. A group holds an equal share of the rows of each part, in the order of the parts.
    A group is a head in in_proj of an HGRN2 layer, and a query group in linear_qkv of attention. linear_fc1 is one
    group.

    Attributes:
        name: name in a torch_dist checkpoint. Both transformer implementations use the same name.
        parts: fla's name -> shape of each part.
        groups: number of groups, which divides the rows of every part.
        padding: number of rows of zeros at the end, for a padded vocabulary.
    """

    name: str
    parts: Mapping[str, tuple[int, ...]]
    groups: int = 1
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of Megatron's tensor."""
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes) + self.padding, *shapes[0][1:])

    def merge(self, tensors: list[Tensor]) -> Tensor:
        """Return Megatron's tensor, made of the parts in the order of `parts`."""
        if len(tensors) > 1:
            tensors = [torch.cat([x.unflatten(0, (self.groups, -1)) for x in tensors], 1).flatten(0, 1)]
        (x,) = tensors
        return torch.cat([x, x.new_zeros(self.padding, *x.shape[1:])]) if self.padding else x

    def split(self, x: Tensor) -> list[Tensor]:
        """Split Megatron's tensor into its parts, in the order of `parts`. Each part is contiguous."""
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        by_group = x[: len(x) - self.padding].unflatten(0, (self.groups, -1))
        return [part.flatten(0, 1).contiguous() for part in by_group.split(rows, 1)]


def weights(args: argparse.Namespace, vocab_size: int) -> list[Weight]:
    """Return the table of all weights of a GPT or a HybridModel, without heads for multi-token prediction.

    Args:
        args: Megatron's args of the model. Megatron's embeddings have `args.padded_vocab_size` rows.
        vocab_size: number of rows of the embeddings in fla's model.
    """
    is_stack, args = is_stack_spec(args.spec), as_gpt(args)
    hgrn2, d, ff = HGRN2Config.of(args), args.hidden_size, args.ffn_hidden_size
    padding, vocab = args.padded_vocab_size - vocab_size, (vocab_size, d)
    table = [Weight("embedding.word_embeddings.weight", {"model.embeddings.weight": vocab}, padding=padding)]
    if hgrn2.lower_bounds == "learned":
        table.append(Weight("decoder.hgrn2_bounds.weight", {"model.lower_bounds": (args.num_layers, d)}))
    for layer in range(args.num_layers):
        megatron_layer, hf_layer = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attn, mlp = hf_layer + "attn.", hf_layer + "mlp."
        is_hgrn2 = hgrn2.is_hgrn2_layer(layer)
        mixer = megatron_layer + "self_attention."
        inner, outer = ("in_proj", "out_proj") if is_hgrn2 else ("linear_qkv", "linear_proj")
        table.append(Weight(f"{mixer}{inner}.layer_norm_weight", {f"{hf_layer}attn_norm.weight": (d,)}))
        if is_hgrn2:
            parts = {f"{attn}{name}_proj.weight": (d, d) for name in "qfi"}
            table.append(Weight(f"{mixer}in_proj.weight", parts, hgrn2.num_heads(d)))
            table.append(Weight(f"{mixer}norm.weight", {f"{attn}g_norm.weight": (d,)}))
        else:
            groups = query_groups(args)
            rows = {"q": d, "k": d // args.num_attention_heads * groups}
            rows["v"] = rows["k"]
            parts = {f"{attn}{name}_proj.weight": (size, d) for name, size in rows.items()}
            table.append(Weight(f"{mixer}linear_qkv.weight", parts, groups))
        table.append(Weight(f"{mixer}{outer}.weight", {f"{attn}o_proj.weight": (d, d)}))
        table.append(Weight(f"{megatron_layer}mlp.linear_fc1.layer_norm_weight", {f"{hf_layer}mlp_norm.weight": (d,)}))
        gate_up = {f"{mlp}{name}_proj.weight": (ff, d) for name in ("gate", "up")}
        table.append(Weight(f"{megatron_layer}mlp.linear_fc1.weight", gate_up))
        table.append(Weight(f"{megatron_layer}mlp.linear_fc2.weight", {f"{mlp}down_proj.weight": (d, ff)}))
    table.append(Weight("decoder.final_layernorm.weight", {"model.norm.weight": (d,)}))
    if args.untie_embeddings_and_output_weights:
        table.append(Weight("output_layer.weight", {"lm_head.weight": vocab}, padding=padding))
    return [dataclasses.replace(w, name=stack_name(w.name)) for w in table] if is_stack else table
