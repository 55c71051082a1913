"""The loss of a language model from its hidden states, chunk of tokens by chunk of tokens.

Megatron makes the logits of a whole sequence, [s, b, vocab/tp], in the model's dtype and in fp32: at 256K tokens and
32000 words 16 and 31 GiB. Here those of one chunk exist at a time, in the forward and in the backward, which makes
them anew: four products with the weight in the place of three.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from hgrn2_kernels.once import once_differentiable
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.patching import change_class


class LossLayer(ColumnParallelLinear):
    """Megatron's output layer, which given labels returns the losses in the place of logits.

    A layer, because Megatron waits for gathered parameters where the module that has them is called.
    """

    @classmethod
    def take_over(cls, layer: ColumnParallelLinear) -> None:
        """Make a built output layer one of this class, its parameters and hooks as they are.

        Raises:
            UsageError: it is not the layer that this class does the work of.
        """
        if type(layer) is not ColumnParallelLinear or getattr(layer, "output_dtype", None) or layer.bias is not None:
            raise UsageError(
                f"--hgrn2-loss-chunk-size needs Megatron's plain output layer, and the model has {layer}: drop the "
                "flag, or what makes the layer another (FP8, logits of another dtype, a bias)"
            )
        change_class(layer, cls, "forward", ["self", "input_", "weight", "runtime_gather_output"])

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        scale_logits: Callable[[Tensor], Tensor] | None = None,
    ):
        """As ColumnParallelLinear's without labels, and with them the losses.

        Args:
            input_: [s, b, h] hidden states; [s/tp, b, h] with sequence parallelism.
            weight: [vocab/tp, h]; the layer's own where None.
            runtime_gather_output: as ColumnParallelLinear's; not read with labels.
            labels: [b, s] int64.
            scale_logits: multiplies logits by a constant, as MuP does.

        Returns:
            [b, s] fp32, the cross-entropy of every token.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        weight = self.weight if weight is None else weight
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        labels = labels.transpose(0, 1)
        losses = _chunked_loss(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            self.config.hgrn2_loss_chunk_size,
            scale_logits,
            self.tp_group,
            self.gradient_accumulation_fusion,
        )
        return losses.view(labels.shape).transpose(0, 1).contiguous()


def output_losses(*, hidden_states, output_layer: LossLayer, output_weight, labels, scale_logits, **unused) -> Tensor:
    """An `output_processor` of GPTModel.forward: [b, s] fp32, the losses that the model itself would return."""
    return output_layer(hidden_states, weight=output_weight, labels=labels, scale_logits=scale_logits)


class _ChunkedLoss(torch.autograd.Function):
    """Losses [t] fp32 of hidden states [t, h], a weight [vocab/tp, h] and labels [t].

    One function over all chunks, so that the weight gets one gradient a call: summed over chunks in fp32, then in the
    weight's dtype, or added to `main_grad` where Megatron fuses that. The gradient of the hidden states is of this
    rank's words alone. The arithmetic is that of Megatron's VocabParallelCrossEntropy, in fp32.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        size: int,
        scale: Callable[[Tensor], Tensor],
        tp_group: ProcessGroup,
        fused: bool,
    ) -> Tensor:
        losses, maxima, sums = (torch.empty_like(labels, dtype=torch.float32) for _ in range(3))
        words = VocabUtility.vocab_range_from_per_partition_vocab_size(len(weight), tp_group.rank(), tp_group.size())
        for part in _chunks(len(hidden), size):
            losses[part], maxima[part], sums[part] = _losses(hidden[part], weight, labels[part], words, scale, tp_group)
        ctx.save_for_backward(hidden, weight, labels, maxima, sums)
        ctx.size, ctx.scale, ctx.words = size, scale, words
        # of the parameter itself, as Megatron's linear layers have it
        ctx.main_grad = getattr(weight, "main_grad", None) if fused else None
        return losses

    @staticmethod
    @once_differentiable(
        "the loss by chunks has no second derivative: leave create_graph out, or call the model without labels and "
        "take torch's cross_entropy of its logits"
    )
    def backward(ctx, saved: tuple[Tensor, ...], dlosses: Tensor):
        hidden, weight, labels, maxima, sums = saved
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in _chunks(len(hidden), ctx.size):
            dlogits = _logits_gradient(
                hidden[part], weight, labels[part], maxima[part], sums[part], dlosses[part], ctx.words, ctx.scale
            )
            if dhidden is not None:
                torch.mm(dlogits, weight, out=dhidden[part])
            if dweight is not None:
                dweight.add_(dlogits.t() @ hidden[part])
            # before those of the next chunk are there
            del dlogits
        dweight = dweight if dweight is None else _deliver(dweight, weight, ctx.main_grad)
        return dhidden, dweight, None, None, None, None, None


# torch.compile breaks its graph here: what it traces no longer knows who asks for a second derivative
_chunked_loss = torch.compiler.disable(_ChunkedLoss.apply)


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    words: tuple[int, int],
    scale: Callable[[Tensor], Tensor],
    tp_group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of a chunk [n, h], and, over all ranks' words, its logits' maxima and sums of exponentials; [n] fp32."""
    logits, maxima = VocabParallelCrossEntropy.calculate_logits_max(scale(hidden @ weight.t()))
    all_reduce(maxima, op=ReduceOp.MAX, group=tp_group)
    _, _, predicted, sums, _ = VocabParallelCrossEntropy.calculate_predicted_logits(logits, labels, maxima, *words)
    all_reduce(predicted, group=tp_group)
    all_reduce(sums, group=tp_group)
    return torch.log(sums) - predicted, maxima, sums


def _logits_gradient(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    maxima: Tensor,
    sums: Tensor,
    dlosses: Tensor,
    words: tuple[int, int],
    scale: Callable[[Tensor], Tensor],
) -> Tensor:
    """Gradient of the product of a chunk [n, h] with the weight: [n, vocab/tp], dtype of hidden."""
    logits = scale(hidden @ weight.t()).float()
    target_mask, target, _, _, softmax = VocabParallelCrossEntropy.calculate_predicted_logits(
        logits, labels, maxima, *words
    )
    softmax.div_(sums.unsqueeze(-1))
    grad_2d, rows, update, grad = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, target_mask)
    dlogits = VocabParallelCrossEntropy.calculate_gradients(grad_2d, rows, target, update, grad, dlosses)
    return scale(dlogits.to(hidden.dtype))


def _deliver(dweight: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """The weight's gradient for autograd: dweight [vocab/tp, h] fp32 in its dtype, or zeros where main_grad has it.

    Zeros are what Megatron's hook on the parameter then takes, which must run, and adds to a tied weight's gradient.
    """
    if main_grad is None:
        return dweight.to(weight.dtype)
    main_grad.add_(dweight)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
