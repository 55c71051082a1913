"""The loss of a language model, computed from its hidden states for one chunk of tokens at a time.

Megatron computes the logits of a whole sequence, [s, b, vocab/tp], in the model's dtype and in fp32. At 256K tokens and
32,000 words these take 16 and 31 GiB. Here only the logits of one chunk exist at a time. The backward computes them
again, so a step takes four products with the output weight instead of three.
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
    """Megatron's output layer, which returns losses instead of logits if it is called with labels.

    This is a layer and not a function, because Megatron waits for gathered parameters when it calls the module that
    holds them.
    """

    @classmethod
    def take_over(cls, layer: ColumnParallelLinear) -> None:
        """Change the class of an output layer to this class. The layer keeps its parameters and hooks.

        Args:
            layer: output layer that a GPTModel has built.

        Raises:
            UsageError: it is not Megatron's plain output layer.
        """
        if type(layer) is not ColumnParallelLinear or getattr(layer, "output_dtype", None) or layer.bias is not None:
            raise UsageError(
                f"--hgrn2-loss-chunk-size needs Megatron's plain output layer, and the model has {layer}: drop the "
                "flag, or the setting that changes the output layer (FP8, logits of another dtype, a bias)"
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
        """Return the loss of each token, or the output of ColumnParallelLinear if there are no labels.

        Args:
            input_: [s, b, h] hidden states, or [s/tp, b, h] under sequence parallelism, in the model's dtype.
            weight: [vocab/tp, h]; None takes the layer's own weight.
            runtime_gather_output: argument of ColumnParallelLinear. It is ignored if there are labels.
            labels: [b, s] int64, or None.
            scale_logits: function that multiplies logits by a constant, as MuP does.

        Returns:
            [b, s] fp32, the cross-entropy of every token in nats.
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
    """Return the losses [b, s] fp32 that the model would return itself, as an `output_processor` of GPTModel.forward.

    Args:
        hidden_states: [s, b, h], or [s/tp, b, h] under sequence parallelism.
        output_layer: the model's output layer.
        output_weight: [vocab/tp, h], or None for the layer's own weight.
        labels: [b, s] int64.
        scale_logits: function that multiplies logits by a constant.
        unused: other arguments that GPTModel passes to an output_processor.
    """
    return output_layer(hidden_states, weight=output_weight, labels=labels, scale_logits=scale_logits)


class _ChunkedLoss(torch.autograd.Function):
    """The losses [t] fp32 of hidden states [t, h], a weight [vocab/tp, h] and labels [t].

    All chunks are one function, so that the weight gets one gradient per call. This gradient is summed over the chunks
    in fp32. Then it is rounded to the weight's dtype, or added to `main_grad` if Megatron fuses gradient accumulation.
    The gradient of the hidden states comes from this rank's words only. The loss is computed in fp32 by Megatron's
    VocabParallelCrossEntropy.
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
        # It is read from the parameter here, as Megatron's linear layers do.
        ctx.main_grad = getattr(weight, "main_grad", None) if fused else None
        return losses

    @staticmethod
    @once_differentiable(
        "the loss by chunks has no second derivative: leave create_graph out, or call the model without labels and "
        "apply torch.nn.functional.cross_entropy to its logits"
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
            # Free these logits before the next chunk allocates its own.
            del dlogits
        dweight = dweight if dweight is None else _finish_weight_gradient(dweight, weight, ctx.main_grad)
        return dhidden, dweight, None, None, None, None, None


# torch.compile must break its graph here, because a traced function cannot refuse a second derivative.
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
    """Return the losses of a chunk [n, h], and the maxima and sums of exponentials of its logits, each [n] fp32.

    Maxima and sums are taken over the words of all tensor-parallel ranks.
    """
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
    """Return the gradient of the product of a chunk [n, h] and the weight: [n, vocab/tp], dtype of hidden."""
    logits = scale(hidden @ weight.t()).float()
    target_mask, target, _, _, softmax = VocabParallelCrossEntropy.calculate_predicted_logits(
        logits, labels, maxima, *words
    )
    softmax.div_(sums.unsqueeze(-1))
    grad_2d, rows, update, grad = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, target_mask)
    dlogits = VocabParallelCrossEntropy.calculate_gradients(grad_2d, rows, target, update, grad, dlosses)
    return scale(dlogits.to(hidden.dtype))


def _finish_weight_gradient(dweight: Tensor, weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """Add the weight's gradient to main_grad, or return it to autograd in the weight's dtype.

    With main_grad this returns zeros. Megatron's hook on the parameter must still run, and adds what autograd returns
    to the gradient of a tied weight.

    Args:
        dweight: [vocab/tp, h] fp32, gradient summed over chunks.
        weight: [vocab/tp, h].
        main_grad: buffer of Megatron's gradient accumulation fusion, or None.
    """
    if main_grad is None:
        return dweight.to(weight.dtype)
    main_grad.add_(dweight)
    weight.grad_added_to_main_grad = True
    return torch.zeros_like(weight)
