"""What context parallel ranks send each other: states of pieces, or whole sequences where these are less."""

import dataclasses
import itertools

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron.context_parallel.pieces import Moves


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Hands states on among the ranks of a group: the `hand_on` of `chunk_hgrn2_sharded`.

    A state's channels of K go their ways apart, so each rank takes a share of them, of every piece on every rank,
    follows these through the chunks and sends back what enters each: two all-to-alls. A rank sends, of each piece,
    H * K * (2 V + 1) numbers at most, however many ranks there are; gathering every state on every rank would take
    H * K * (V + 1) from each of the others. In fp32, decays as logs.

    Attributes:
        group: the context parallel ranks.
    """

    group: ProcessGroup

    def __call__(self, state: Tensor, log_decay: Tensor, reverse: bool):
        """Start the exchange; see `chunk_hgrn2_sharded`.

        Args:
            state: [2 n, H, K, V] of two pieces of each of n sequences, the same n on every rank.
            log_decay: [2 n, H, K].
            reverse: whether gradients go backwards in time.
        """
        cp, (pieces, H, K, V) = self.group.size(), state.shape
        share = -(-H * K // cp)
        own = [state.flatten(1, 2), log_decay.flatten(1, 2)[..., None]]
        if H * K < share * cp:
            own = [torch.nn.functional.pad(x, (0, 0, 0, share * cp - H * K)) for x in own]
        own = [x.unflatten(1, (cp, share)).unflatten(0, (-1, 2)).permute(2, 1, 0, 3, 4) for x in own]
        # [cp, 2, n, share, V + 1]
        sent = torch.cat(own, -1).contiguous()
        # of the ranks' first and second pieces, in the order of time
        order = [*range(0, 2 * cp, 2), *range(2 * cp - 1, 0, -2)]
        if reverse:
            order.reverse()

        def exchange() -> Tensor:
            received = self._all_to_all(sent).flatten(0, 1)
            entering = received.new_empty(*received.shape[:-1], V)
            states, decays, entered = received[..., :-1].unbind(), received[..., -1:].exp().unbind(), entering.unbind()
            entered[order[0]].zero_()
            for piece, later in itertools.pairwise(order):
                torch.addcmul(states[piece], decays[piece], entered[piece], out=entered[later])
            back = self._all_to_all(entering).unflatten(0, (cp, 2)).permute(2, 1, 0, 3, 4)
            return back.flatten(2, 3)[:, :, : H * K].reshape(pieces, H, K, V)

        return _beside(exchange, sent)

    def _all_to_all(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        torch.distributed.all_to_all_single(received, x, group=self.group)
        return received


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _beside(work, sent: Tensor):
    """Start `work`, which reads `sent`, beside what the GPU does next; returns a function that waits for its result."""
    if not sent.is_cuda:
        return work
    stream = _streams.get(sent.device) or _streams.setdefault(sent.device, torch.cuda.Stream(sent.device))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    sent.record_stream(stream)

    def wait() -> Tensor:
        torch.cuda.current_stream().wait_stream(stream)
        result.record_stream(torch.cuda.current_stream())
        return result

    return wait


def chunk_hgrn2_of_moved(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, moves: Moves) -> Tensor:
    """The operator over sequences that each go to one rank as a whole, and their outputs back; differentiable.

    Args:
        qfv: [1, t, H, 3, K], this rank's tokens of all of them, in the order of `moves`.
        lower_bound: [H, K] fp32, or None.

    Returns:
        o: [1, t, H, K].
    """
    received = [moves.sizes[group.rank()]] * group.size()
    x = all_to_all(group, qfv[0], received, moves.sizes)[None]
    x = permute(x, moves.order, moves.inverse)
    if x.shape[1]:
        o = chunk_hgrn2_fused(x, lower_bound, cu_seqlens=moves.cu_seqlens)[0]
    else:
        # a rank may have no sequence, but its outputs depend on whatever the other ranks' do: the backward sends too
        o = x[:, :, :, 0] if lower_bound is None else x[:, :, :, 0] + lower_bound.to(x.dtype)
    o = permute(o, moves.inverse, moves.order)
    return all_to_all(group, o[0], moves.sizes, received)[None]


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """x[:, order] of [1, t, ...], whose gradient is gathered by the inverse; differentiable."""
    return _Permute.apply(x, order, inverse)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, order, inverse):
        ctx.save_for_backward(inverse)
        return x.index_select(1, order)

    @staticmethod
    def backward(ctx, gradient):
        (inverse,) = ctx.saved_tensors
        return gradient.index_select(1, inverse), None, None


def bytes_sent(num_states: int, num_moved: int, H: int, K: int, cp: int, itemsize: int) -> float:
    """What a layer's forward and backward send from each rank to the others, in the mean over the ranks.

    Args:
        num_states: sequences whose states are handed on; 1 for a stream, however many documents it holds.
        num_moved: tokens a rank of those that move.
        H, K: heads a rank, and their dimension.
        itemsize: bytes of a number of q, f, v and o.
    """
    # of two pieces a sequence: state and decay there, the state back; every rank takes as many channels
    states = num_states * 2 * -(-H * K // cp) * cp * (2 * K + 1) * 4
    # q, f and v there, o back
    tokens = num_moved * 4 * H * K * itemsize
    return 2 * (states + tokens) * (cp - 1) / cp
