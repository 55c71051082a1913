"""fla's HGRN2 weights on Hugging Face beside Megatron's: names, shapes and the order of rows, both ways.

Source: fla-org/flash-linear-attention 0.6.0, fla/models/hgrn2 and fla/layers/{hgrn2,attn}.py. docs/conversion.md is the
same for people.
"""

import argparse
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from hgrn2_megatron.config import HGRN2Config
from hgrn2_megatron.conversion.config import query_groups


@dataclasses.dataclass(frozen=True)
class Weight:
    """A tensor of a Megatron checkpoint, and those of fla that it is made of.

    Its rows are group by group, and within a group each part's share of rows in the order of the parts: head by head
    in an HGRN2 layer's in_proj, by query group in attention's linear_qkv, one group in linear_fc1.

    Attributes:
        name: in a torch_dist checkpoint, of either transformer implementation.
        parts: fla's name -> shape.
        groups: G, which divides the rows of every part.
        padding: rows of zeros behind, where the vocabulary is padded.
    """

    name: str
    parts: Mapping[str, tuple[int, ...]]
    groups: int = 1
    padding: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shapes = list(self.parts.values())
        return (sum(shape[0] for shape in shapes) + self.padding, *shapes[0][1:])

    def merge(self, tensors: list[Tensor]) -> Tensor:
        """The parts, in order, as Megatron has them."""
        if len(tensors) > 1:
            tensors = [torch.cat([x.unflatten(0, (self.groups, -1)) for x in tensors], 1).flatten(0, 1)]
        (x,) = tensors
        return torch.cat([x, x.new_zeros(self.padding, *x.shape[1:])]) if self.padding else x

    def split(self, x: Tensor) -> list[Tensor]:
        """Megatron's tensor as the parts, in order, each contiguous."""
        rows = [shape[0] // self.groups for shape in self.parts.values()]
        by_group = x[: len(x) - self.padding].unflatten(0, (self.groups, -1))
        return [part.flatten(0, 1).contiguous() for part in by_group.split(rows, 1)]


def weights(args: argparse.Namespace, vocab_size: int) -> list[Weight]:
    """Every weight of a model.

    Args:
        args: Megatron's, of the model.
        vocab_size: rows of the embeddings in fla's model; `args.padded_vocab_size` are Megatron's.
    """
    hgrn2, d, ff = HGRN2Config.of(args), args.hidden_size, args.ffn_hidden_size
    padding, vocab = args.padded_vocab_size - vocab_size, (vocab_size, d)
    found = [Weight("embedding.word_embeddings.weight", {"model.embeddings.weight": vocab}, padding=padding)]
    if hgrn2.lower_bounds == "learned":
        found.append(Weight("decoder.hgrn2_bounds.weight", {"model.lower_bounds": (args.num_layers, d)}))
    for layer in range(args.num_layers):
        megatron_layer, hf_layer = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        attn, mlp = hf_layer + "attn.", hf_layer + "mlp."
        is_hgrn2 = hgrn2.is_hgrn2_layer(layer)
        mixer = megatron_layer + "self_attention."
        inner, outer = ("in_proj", "out_proj") if is_hgrn2 else ("linear_qkv", "linear_proj")
        found.append(Weight(f"{mixer}{inner}.layer_norm_weight", {f"{hf_layer}attn_norm.weight": (d,)}))
        if is_hgrn2:
            parts = {f"{attn}{name}_proj.weight": (d, d) for name in "qfi"}
            found.append(Weight(f"{mixer}in_proj.weight", parts, hgrn2.num_heads(d)))
            found.append(Weight(f"{mixer}norm.weight", {f"{attn}g_norm.weight": (d,)}))
        else:
            groups = query_groups(args)
            rows = {"q": d, "k": d // args.num_attention_heads * groups}
            rows["v"] = rows["k"]
            parts = {f"{attn}{name}_proj.weight": (size, d) for name, size in rows.items()}
            found.append(Weight(f"{mixer}linear_qkv.weight", parts, groups))
        found.append(Weight(f"{mixer}{outer}.weight", {f"{attn}o_proj.weight": (d, d)}))
        found.append(Weight(f"{megatron_layer}mlp.linear_fc1.layer_norm_weight", {f"{hf_layer}mlp_norm.weight": (d,)}))
        gate_up = {f"{mlp}{name}_proj.weight": (ff, d) for name in ("gate", "up")}
        found.append(Weight(f"{megatron_layer}mlp.linear_fc1.weight", gate_up))
        found.append(Weight(f"{megatron_layer}mlp.linear_fc2.weight", {f"{mlp}down_proj.weight": (d, ff)}))
    found.append(Weight("decoder.final_layernorm.weight", {"model.norm.weight": (d,)}))
    if args.untie_embeddings_and_output_weights:
        found.append(Weight("output_layer.weight", {"lm_head.weight": vocab}, padding=padding))
    return found
