"""The operator over sequences that are sharded over several processes: `chunk_hgrn2_sharded`.

Each process sums up the effect of its tokens on a state that enters them. A callback of the caller exchanges these sums
and returns the states that enter, and the operator runs from there. The backward does the same in reverse: the callback
returns the gradients of the states that leave. So each process runs one forward and one backward over its own tokens,
and one additional pass over states in each direction.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hgrn2_kernels import op
from hgrn2_kernels.checks import check_chunk, check_kernels, checked_scale, split_fused
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.once import OPERATORS, once_differentiable
from hgrn2_kernels.op import chunk_hgrn2_pytorch
from hgrn2_kernels.shard_states import shard_states
from hgrn2_kernels.strides import dense_like
from hgrn2_kernels.torch_ops import is_eager

# (state [M, H, K, V], log_decay [M, H, K], reverse) -> a function that waits for the states that enter [M, H, K, V]
HandOn = Callable[[Tensor, Tensor, bool], Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Ends:
    """The tokens at one end of each piece that belong to a sequence which continues on another process.

    Attributes:
        cu_seqlens: [N + 1] int32, boundaries that separate these tokens from the others.
        rows: [M] int64, the number, out of N, of the tokens of each piece. If they are empty, no tokens belong there.
        stops: the pieces in which the sequence begins or ends, so that no state passes them.
    """

    cu_seqlens: Tensor
    rows: Tensor
    stops: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The division of the packed tokens of one process into whole sequences and M pieces of sharded sequences.

    Attributes:
        cu_seqlens: [N + 1] int32, boundaries of the sequences and the parts of sequences of this process.
        entered: [N] int32, the piece that each of them begins, or -1 where a sequence begins.
        left: [N] int32, the piece that each of them ends, or -1 where a sequence ends.
        last_tokens: the last tokens of each piece, whose effect on the state later pieces need. None where the first M
            of the N are the pieces.
        first_tokens: the first tokens of each piece, whose effect on the gradient of the state earlier pieces need in
            the backward. None where `last_tokens` is None.
        count: M.
    """

    cu_seqlens: Tensor
    entered: Tensor
    left: Tensor
    count: int
    last_tokens: Ends | None = None
    first_tokens: Ends | None = None

    def borders(self, reverse: bool) -> Tensor:
        """Return the cu_seqlens that separate the tokens whose effects are summed up."""
        ends = self.first_tokens if reverse else self.last_tokens
        return self.cu_seqlens if ends is None else ends.cu_seqlens

    def choose(self, state: Tensor, log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Select the sums of the M pieces, [M, H, K, V] and [M, H, K], out of the sums between these boundaries."""
        ends = self.first_tokens if reverse else self.last_tokens
        if ends is None:
            return state[: self.count], log_decay[: self.count]
        log_decay = log_decay[ends.rows]
        for piece in ends.stops:
            log_decay[piece] = -torch.inf
        return state[ends.rows], log_decay


def chunk_hgrn2_sharded(
    qfv: Tensor,
    lower_bound: Tensor | None,
    hand_on: HandOn,
    *,
    scale: float | None = None,
    pieces: Pieces | None = None,
) -> Tensor:
    """Run `chunk_hgrn2_fused` on the tokens of this process, where other processes have the rest of the sequences.

    It is differentiable once. Every process calls it on its own tokens, and runs its backward. It keeps its inputs and
    the entering states for the backward.

    Args:
        qfv: [B, T, H, 3, K] fp64, fp32, bf16 or fp16, raw projections of the tokens of this process.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1), or None. Its gradient is the part that these
            tokens contribute.
        hand_on: a function that is called as hand_on(state, log_decay, reverse). It may start an exchange, and returns
            a function without arguments that waits for it and returns [M, H, K, V].
            In the forward, reverse is False. state [M, H, K, V] is the state after each of the M pieces if it is 0
            before the piece, and log_decay [M, H, K] is the log decay of a state that passes the piece, in nats. Both
            are fp32 (fp64 with fp64 inputs). The result is the state that enters each piece.
            In the backward, reverse is True. state is the gradient of the state before each piece, from the outputs of
            that piece alone. The result is the gradient of the state that leaves each piece.
        scale: factor on the output. None means K**-0.5.
        pieces: the pieces among packed tokens. None means that each row of the batch is a piece, and M = B.

    Returns:
        o: [B, T, H, K] dtype of qfv.

    Raises:
        ValueError: `chunk_hgrn2_fused` would raise one for these arguments.
        NotImplementedError: a gradient is differentiated again.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2, with the state passed from shard to shard.
    """
    q, f, v = split_fused(qfv)
    check_chunk(q, f, v, lower_bound, None, None if pieces is None else pieces.cu_seqlens)
    scale = checked_scale(scale, q)
    if op.implementation(q.device, q.dtype) == "triton":
        check_kernels(q, v, scale)
    if is_eager(qfv):
        return Sharded.apply(qfv, lower_bound, hand_on, scale, pieces)
    from hgrn2_kernels.untraced import apply_sharded

    return apply_sharded(qfv, lower_bound, hand_on, scale, pieces)


class Sharded(torch.autograd.Function):
    """The autograd function of `chunk_hgrn2_sharded`."""

    @staticmethod
    def forward(ctx, qfv, lower_bound, hand_on, scale, pieces):
        inputs = _inputs(qfv, lower_bound, scale, pieces)
        o, entering = _implementation(qfv).forward(inputs, hand_on, pieces)
        ctx.save_for_backward(qfv, lower_bound, entering)
        ctx.options = hand_on, scale, pieces
        return o

    @staticmethod
    @once_differentiable(OPERATORS)
    def backward(ctx, saved, do):
        qfv, lower_bound, entering = saved
        hand_on, scale, pieces = ctx.options
        inputs = _inputs(qfv, lower_bound, scale, pieces)
        dqfv = dense_like(qfv)
        dbound = _implementation(qfv).backward(do, inputs, entering, hand_on, pieces, into=dqfv.unbind(-2))
        return dqfv, dbound, None, None, None


def _inputs(qfv, lower_bound, scale, pieces):
    return Inputs(*qfv.unbind(-2), lower_bound, None, None if pieces is None else pieces.cu_seqlens, scale)


def _implementation(qfv):
    """Return the module (or class) whose functions `forward` and `backward` compute these inputs."""
    if op.implementation(qfv.device, qfv.dtype) == "triton":
        # a CPU needs no triton
        from hgrn2_kernels import sharded_triton

        return sharded_triton
    return _PyTorch


class _PyTorch:
    """The operator in plain PyTorch, made of the other operators. A CPU gains nothing from sharing their passes."""

    @staticmethod
    def forward(inputs, hand_on, pieces):
        """Return o and the states that enter the pieces."""
        q, f, v, lower_bound, _, cu_seqlens, scale = inputs
        borders = None if pieces is None else pieces.borders(reverse=False)
        summary = shard_states(f, v, lower_bound, cu_seqlens=borders)
        if pieces is not None:
            summary = pieces.choose(*summary, reverse=False)
        entering = hand_on(*summary, False)()
        initial = entering if pieces is None else _spread(entering, pieces.entered)
        o, _ = chunk_hgrn2_pytorch(q, f, v, lower_bound, scale=scale, initial_state=initial, cu_seqlens=cu_seqlens)
        return o, entering

    @staticmethod
    def backward(do, inputs, entering, hand_on, pieces, into):
        """Write the gradients of q, f and v to `into`, and return the gradient of the bound."""
        q, f, v, lower_bound, _, cu_seqlens, scale = inputs
        borders = None if pieces is None else pieces.borders(reverse=True)
        _, log_decay = shard_states(f, v, lower_bound, cu_seqlens=borders)
        leaves = [x if x is None else x.detach().requires_grad_() for x in (q, f, v, lower_bound)]
        before = v.new_zeros((*log_decay.shape, v.shape[-1]), dtype=log_decay.dtype, requires_grad=True)
        with torch.enable_grad():
            o, _ = chunk_hgrn2_pytorch(*leaves, scale=scale, initial_state=before, cu_seqlens=borders)
        summary = (*torch.autograd.grad(o, before, do), log_decay)
        if pieces is not None:
            summary = pieces.choose(*summary, reverse=True)
        leaving = hand_on(*summary, True)()
        if pieces is not None:
            entering, leaving = _spread(entering, pieces.entered), _spread(leaving, pieces.left)
        with torch.enable_grad():
            outputs = chunk_hgrn2_pytorch(
                *leaves, scale=scale, initial_state=entering, output_final_state=True, cu_seqlens=cu_seqlens
            )
        leaves = [x for x in leaves if x is not None]
        dq, df, dv, *dbound = torch.autograd.grad(outputs, leaves, (do, leaving))
        for out, x in zip(into, (dq, df, dv), strict=True):
            out.copy_(x)
        return dbound[0] if dbound else None


def _spread(x: Tensor, rows: Tensor) -> Tensor:
    """Return x[rows], with zeros where a row is -1."""
    return torch.cat([x, torch.zeros_like(x[:1])])[rows.long()]
