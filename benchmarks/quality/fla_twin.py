"""fla's HGRN2ForCausalLM in Megatron's training loop, with the first weights of Megatron's model.

The loop gives both models the same batches, optimizer, schedule and gradient clipping, so only the code of the model
differs. On a GPU, fla runs its chunk kernels and its fused norms, SwiGLU and cross-entropy. On a CPU, Triton's
interpreter runs its recurrent kernels, which fla takes for sequences of at most 64 tokens, and the loss is Megatron's.
"""

import torch
from fla.models import HGRN2Config, HGRN2ForCausalLM
from fla.modules import FusedCrossEntropyLoss
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MegatronModule
from megatron.training import get_args
from torch import Tensor
from torch.nn.utils import parametrize
from triton.runtime.autotuner import Autotuner

from hgrn2_megatron.conversion.command import TOKEN_IDS
from hgrn2_megatron.conversion.config import hf_config
from hgrn2_megatron.conversion.weights import weights

ON_GPU = torch.cuda.is_available()
# Megatron's own modules have other names for the norms than Transformer Engine and checkpoints.
NORMS = {
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
LONGEST_ON_CPU = 64

if not ON_GPU:
    # Only a GPU could time the forms of a kernel. Equal times make Triton take the first form.
    Autotuner.do_bench = lambda self, call, quantiles: [0.0] * len(quantiles)


class Rows(torch.nn.Module):
    """A matrix that is stored flat. Megatron's weight decay leaves flat weights alone, as it does our table of bounds.

    Args:
        rows: rows of the matrix.
    """

    def __init__(self, rows: int):
        super().__init__()
        self.rows = rows

    def forward(self, flat: Tensor) -> Tensor:
        return flat.view(self.rows, -1)

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix.flatten()


class FlaTwin(MegatronModule):
    """fla's model with the weights of a pure HGRN2 model of Megatron.

    Args:
        model: Megatron's model, on one process.

    Raises:
        ValueError: the model cannot be a model of fla, has weights that fla's does not have, or runs on a CPU with
            sequences that are too long for it.
    """

    def __init__(self, model: GPTModel):
        super().__init__(model.config)
        # The loop asks the model for both.
        self.pg_collection, self.model_type = model.pg_collection, model.model_type
        args = get_args()
        if not ON_GPU and args.seq_length > LONGEST_ON_CPU:
            raise ValueError(
                f"--seq-length is {args.seq_length}, and fla runs on a CPU with at most {LONGEST_ON_CPU} tokens: give "
                "--size toy, or use a GPU"
            )
        vocab = args.padded_vocab_size
        fused = dict.fromkeys(("fuse_norm", "fuse_swiglu", "fuse_cross_entropy"), ON_GPU)
        dtype = str(model.config.params_dtype).removeprefix("torch.")
        self.fla = HGRN2ForCausalLM(HGRN2Config(**hf_config(args, vocab, dtype, TOKEN_IDS) | fused))
        self.fla.to(next(model.parameters()).device)
        copy_weights(model, self.fla)
        if "lower_bounds" in dict(self.fla.model.named_parameters(recurse=False)):
            parametrize.register_parametrization(self.fla.model, "lower_bounds", Rows(args.num_layers))
        self.fused_loss = FusedCrossEntropyLoss(reduction="none", inplace_backward=True)

    def set_input_tensor(self, input_tensor):
        """Do nothing. Megatron calls this with the output of the pipeline stage before, and there is none."""

    def forward(self, tokens: Tensor, position_ids, attention_mask, labels: Tensor, **ignored) -> Tensor:
        """Return the losses [B, T] fp32 of tokens and labels, each [B, T] int64, as Megatron's model does."""
        logits = self.fla(tokens, use_cache=False).logits
        if ON_GPU:
            return self.fused_loss(logits.flatten(0, 1), labels.flatten()).view_as(labels)
        # Megatron's fused loss rounds the gradient of fp32 logits to bf16, so another loss would not be comparable.
        logits, targets = logits.transpose(0, 1).contiguous(), labels.t().contiguous()
        return fused_vocab_parallel_cross_entropy(logits, targets, self.pg_collection.tp).t().contiguous()


@torch.no_grad()
def copy_weights(model: GPTModel, fla: HGRN2ForCausalLM):
    """Copy all weights of Megatron's model into fla's.

    Raises:
        ValueError: one of the models has weights that the other one does not have.
    """
    args, ours, theirs = get_args(), dict(model.named_parameters()), dict(fla.named_parameters())
    for weight in weights(args, args.padded_vocab_size):
        name = weight.name
        for checkpoint, local in NORMS.items():
            name = name if name in ours else name.replace(checkpoint, local)
        parts = weight.split(ours.pop(name).view(weight.shape))
        for part, x in zip(weight.parts, parts, strict=True):
            theirs.pop(part).copy_(x)
    if ours or theirs:
        raise ValueError(f"weights without a twin: {sorted(ours)} of Megatron's model, {sorted(theirs)} of fla's")


def with_twin(config):
    """Return the config of Megatron's model, changed so that fla's model takes its place when it is built."""
    config.pre_wrap_hooks.append(lambda chunks: [FlaTwin(chunk) for chunk in chunks])
    return config
