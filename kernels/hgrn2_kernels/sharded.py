"""The operator over sequences of which other processes have the rest: `chunk_hgrn2_sharded`.

A process sums up what its tokens do to a state that enters them, a callback finds what enters them from what all
processes say, and the operator runs from there. The backward mirrors it: the callback finds the gradient of the state
that leaves. So each process runs one forward and one backward over its own tokens, and one pass over states each way.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hgrn2_kernels.checks import check_chunk, check_kernels, split_fused
from hgrn2_kernels.library import is_eager
from hgrn2_kernels.once import OPERATORS, once_differentiable
from hgrn2_kernels.op import chunk_hgrn2_pytorch, implementation
from hgrn2_kernels.segments import segment_states
from hgrn2_kernels.strides import dense_like

# (state [M, H, K, V], log_decay [M, H, K], reverse) -> a function that waits for what enters [M, H, K, V]
HandOn = Callable[[Tensor, Tensor, bool], Callable[[], Tensor]]


@dataclasses.dataclass(frozen=True)
class Ends:
    """Which tokens at one end of each piece belong to a sequence that goes on beyond it.

    Attributes:
        cu_seqlens: [N + 1] int32, borders that set these tokens apart from the others.
        rows: [M] int64, of these N, the tokens of each piece; empty ones say that nothing belongs there.
        stops: pieces within which the sequence begins or ends: no state passes them.
    """

    cu_seqlens: Tensor
    rows: Tensor
    stops: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How a process's tokens, packed along T, are M pieces of sequences that go on elsewhere, and others.

    Attributes:
        cu_seqlens: [N + 1] int32, borders of its sequences and parts of sequences.
        entered: [N] int32, the piece whose beginning each of them is, -1 where a sequence begins.
        left: [N] int32, the piece whose end each of them is, -1 where a sequence ends.
        tails: the last tokens of each piece, which what comes later needs; None where each of the first M of the N is
            a piece.
        heads: the first tokens of each piece, which the backward of what came before needs; None likewise.
        count: M.
    """

    cu_seqlens: Tensor
    entered: Tensor
    left: Tensor
    count: int
    tails: Ends | None = None
    heads: Ends | None = None

    def borders(self, reverse: bool) -> Tensor:
        """cu_seqlens of what is summed up."""
        ends = self.heads if reverse else self.tails
        return self.cu_seqlens if ends is None else ends.cu_seqlens

    def choose(self, state: Tensor, log_decay: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Of what is summed up between those borders, the pieces' [M, H, K, V] and [M, H, K]."""
        ends = self.heads if reverse else self.tails
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
    """`chunk_hgrn2_fused` where other processes have the rest of the sequences; differentiable, once.

    Every process calls it on its own tokens, and runs its backward. It keeps its inputs and the entering states.

    Args:
        qfv: [B, T, H, 3, K] fp64, fp32, bf16 or fp16, raw projections of this process's tokens.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1), or None. Its gradient is that of these tokens.
        hand_on: called with what each of M pieces does to a state that passes it: the state [M, H, K, V] after it from
            zeros before, and the log decay [M, H, K], nats, both of the dtype of states, and False. It may start an
            exchange, and returns a function without arguments that waits for it and returns the states
            [M, H, K, V] that enter the pieces. In the backward it is called with gradients and True: of the state
            before each piece, from its own outputs alone; it finds those of the states that leave the pieces.
        scale: factor on the output; K**-0.5 when None.
        pieces: which of the tokens are pieces, for packed sequences; None where each row of the batch is one, M = B.

    Returns:
        o: [B, T, H, K] dtype of qfv.

    Raises:
        ValueError: as `chunk_hgrn2_fused`.
    """
    q, f, v = split_fused(qfv)
    check_chunk(q, f, v, lower_bound, None, None if pieces is None else pieces.cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if implementation(q.device, q.dtype) == "triton":
        check_kernels(q, v, scale)
    if is_eager(qfv):
        return Sharded.apply(qfv, lower_bound, hand_on, scale, pieces)
    from hgrn2_kernels.untraced import apply_sharded

    return apply_sharded(qfv, lower_bound, hand_on, scale, pieces)


class Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qfv, lower_bound, hand_on, scale, pieces):
        o, entering = _form(qfv).forward(*qfv.unbind(-2), lower_bound, hand_on, scale, pieces)
        ctx.save_for_backward(qfv, lower_bound, entering)
        ctx.options = hand_on, scale, pieces
        return o

    @staticmethod
    @once_differentiable(OPERATORS)
    def backward(ctx, saved, do):
        qfv, lower_bound, entering = saved
        dqfv = dense_like(qfv)
        dbound = _form(qfv).backward(do, *qfv.unbind(-2), lower_bound, entering, *ctx.options, into=dqfv.unbind(-2))
        return dqfv, dbound, None, None, None


def _form(qfv):
    """The module of functions `forward` and `backward` that runs for these inputs."""
    if implementation(qfv.device, qfv.dtype) == "triton":
        # a CPU needs no triton
        from hgrn2_kernels import sharded_triton

        return sharded_triton
    return _PyTorch


class _PyTorch:
    """The form in plain PyTorch, made of the other operators: on a CPU nothing is gained by sharing their passes."""

    @staticmethod
    def forward(q, f, v, lower_bound, hand_on, scale, pieces):
        """Returns o and the states that enter the pieces."""
        borders = None if pieces is None else pieces.borders(reverse=False)
        summary = segment_states(f, v, lower_bound, cu_seqlens=borders)
        if pieces is not None:
            summary = pieces.choose(*summary, reverse=False)
        entering = hand_on(*summary, False)()
        first, borders = (entering, None) if pieces is None else (_spread(entering, pieces.entered), pieces.cu_seqlens)
        o, _ = chunk_hgrn2_pytorch(q, f, v, lower_bound, scale=scale, initial_state=first, cu_seqlens=borders)
        return o, entering

    @staticmethod
    def backward(do, q, f, v, lower_bound, entering, hand_on, scale, pieces, into):
        """Fills `into` with the gradients of q, f and v, and returns the bound's."""
        borders = None if pieces is None else pieces.borders(reverse=True)
        _, log_decay = segment_states(f, v, lower_bound, cu_seqlens=borders)
        inputs = [x if x is None else x.detach().requires_grad_() for x in (q, f, v, lower_bound)]
        before = v.new_zeros((*log_decay.shape, v.shape[-1]), dtype=log_decay.dtype, requires_grad=True)
        with torch.enable_grad():
            o, _ = chunk_hgrn2_pytorch(*inputs, scale=scale, initial_state=before, cu_seqlens=borders)
        summary = (*torch.autograd.grad(o, before, do), log_decay)
        if pieces is not None:
            summary = pieces.choose(*summary, reverse=True)
        leaving = hand_on(*summary, True)()
        borders = None
        if pieces is not None:
            entering, leaving = _spread(entering, pieces.entered), _spread(leaving, pieces.left)
            borders = pieces.cu_seqlens
        with torch.enable_grad():
            outputs = chunk_hgrn2_pytorch(
                *inputs, scale=scale, initial_state=entering, output_final_state=True, cu_seqlens=borders
            )
        leaves = [x for x in inputs if x is not None]
        dq, df, dv, *dbound = torch.autograd.grad(outputs, leaves, (do, leaving))
        for out, x in zip(into, (dq, df, dv), strict=True):
            out.copy_(x)
        return dbound[0] if dbound else None


def _spread(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], zeros where a row is -1."""
    return torch.cat([x, torch.zeros_like(x[:1])])[rows.long()]
