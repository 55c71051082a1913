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

# Value of the argument runtime_gather_output that asks LossLayer for PendingLogits.
BY_CHUNKS = "by chunks"


class LossLayer(ColumnParallelLinear):
    """Megatron's output layer, which can leave its logits to be computed later, for one chunk of tokens at a time.

    This is a layer and not a function, because Megatron waits for gathered parameters when it calls the module that
    holds them.
    """

    @classmethod
    def take_over(cls, layer: ColumnParallelLinear) -> None:
        """Change the class of an output layer to this class. The layer keeps its parameters and hooks.

        Args:
            layer: output layer that a GPTModel or a HybridModel has built.

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
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | str | None = None
    ) -> tuple:
        """Return PendingLogits and None if runtime_gather_output is BY_CHUNKS, else the output of ColumnParallelLinear.

        A model passes this argument on to every call of its output layer. So it reaches the calls for the heads of
        multi-token prediction too.

        Args:
            input_: [s, b, h] hidden states, or [s/tp, b, h] under sequence parallelism, in the model's dtype.
            weight: [vocab/tp, h]; None takes the layer's own weight.
            runtime_gather_output: BY_CHUNKS, or an argument of ColumnParallelLinear.
        """
        if runtime_gather_output != BY_CHUNKS:
            return super().forward(input_, weight, runtime_gather_output)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(input_, group=self.tp_group)
        else:
            hidden = copy_to_tensor_model_parallel_region(input_, group=self.tp_group)
        return PendingLogits(self, hidden.flatten(0, 1), self.weight if weight is None else weight), None


class PendingLogits:
    """The logits of all tokens, which are computed for one chunk of tokens at a time when their losses are asked for.

    A model treats them as the tensor that they stand for: it multiplies them by a constant, and makes losses of them.

    Args:
        layer: output layer of the logits.
        hidden: [s b, h] hidden states of all tokens, in the model's dtype.
        weight: [vocab/tp, h].
        factor: number that multiplies the logits, as MuP asks for.
    """

    def __init__(self, layer: LossLayer, hidden: Tensor, weight: Tensor, factor: float = 1.0):
        self.layer, self.hidden, self.weight, self.factor = layer, hidden, weight, factor

    def __mul__(self, factor: float) -> "PendingLogits":
        return PendingLogits(self.layer, self.hidden, self.weight, self.factor * factor)

    def losses(self, labels: Tensor) -> Tensor:
        """Return the cross-entropy of every token in nats, [b, s] fp32.

        Args:
            labels: [b, s] int64.
        """
        labels = labels.transpose(0, 1)
        losses = _chunked_loss(
            self.hidden,
            self.weight,
            labels.flatten(),
            self.layer.config.hgrn2_loss_chunk_size,
            self.factor,
            self.layer.tp_group,
            self.layer.gradient_accumulation_fusion,
        )
        return losses.view(labels.shape).transpose(0, 1).contiguous()

    @torch.no_grad()
    def sums(self, count: Callable, *values: Tensor) -> tuple[Tensor, ...]:
        """Return the sums over all chunks of what `count` returns for one chunk of n tokens.

        Args:
            count: function of logits [n, 1, vocab/tp] in the model's dtype, and of one tensor [1, n] for each of
                `values`. It returns a tuple of tensors.
            values: values of each token, [b, s].
        """
        columns = [x.transpose(0, 1).flatten() for x in values]
        counts = (
            count(_logits(self.hidden[part], self.weight, self.factor)[:, None], *(x[None, part] for x in columns))
            for part in _chunks(len(self.hidden), self.layer.config.hgrn2_loss_chunk_size)
        )
        return tuple(sum(parts) for parts in zip(*counts, strict=True))


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
        factor: float,
        tp_group: ProcessGroup,
        fused: bool,
    ) -> Tensor:
        losses, maxima, sums = (torch.empty_like(labels, dtype=torch.float32) for _ in range(3))
        words = VocabUtility.vocab_range_from_per_partition_vocab_size(len(weight), tp_group.rank(), tp_group.size())
        for part in _chunks(len(hidden), size):
            losses[part], maxima[part], sums[part] = _losses(
                hidden[part], weight, labels[part], words, factor, tp_group
            )
        ctx.save_for_backward(hidden, weight, labels, maxima, sums)
        ctx.size, ctx.factor, ctx.words = size, factor, words
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
                hidden[part], weight, labels[part], maxima[part], sums[part], dlosses[part], ctx.words, ctx.factor
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


def _logits(hidden: Tensor, weight: Tensor, factor: float) -> Tensor:
    return _scaled(hidden @ weight.t(), factor)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1 else x * factor


def _losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    words: tuple[int, int],
    factor: float,
    tp_group: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses of a chunk [n, h], and the maxima and sums of exponentials of its logits, each [n] fp32.

    Maxima and sums are taken over the words of all tensor-parallel ranks.
    """
    logits, maxima = VocabParallelCrossEntropy.calculate_logits_max(_logits(hidden, weight, factor))
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
    factor: float,
) -> Tensor:
    """Return the gradient of the product of a chunk [n, h] and the weight: [n, vocab/tp], dtype of hidden."""
    logits = _logits(hidden, weight, factor).float()
    target_mask, target, _, _, softmax = VocabParallelCrossEntropy.calculate_predicted_logits(
        logits, labels, maxima, *words
    )
    softmax.div_(sums.unsqueeze(-1))
    grad_2d, rows, update, grad = VocabParallelCrossEntropy.prepare_gradient_calculation_operands(softmax, target_mask)
    dlogits = VocabParallelCrossEntropy.calculate_gradients(grad_2d, rows, target, update, grad, dlosses)
    return _scaled(dlogits.to(hidden.dtype), factor)


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
