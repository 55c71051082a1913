"""Communication between context-parallel ranks: the exchange of states, and the gathering of short sequences."""

import dataclasses
import itertools

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup

from hgrn2_kernels import chunk_hgrn2_fused
from hgrn2_megatron.context_parallel.pieces import GatherPlan


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Exchange of states among context-parallel ranks, for the argument `hand_on` of `chunk_hgrn2_sharded`.

    The K channels of a state do not depend on each other. So the ranks divide the channels among them. A first
    all-to-all gives each rank its share of the channels of every piece. The rank follows these channels through the
    pieces in the order of time. A second all-to-all sends back the states that enter each piece. For each piece a rank
    sends at most H * K * (2 V + 1) numbers, at any number of ranks. An all-gather of all states would receive
    H * K * (V + 1) numbers from every other rank. States and logs of decays are sent in fp32.

    Attributes:
        group: the context-parallel ranks.
    """

    group: ProcessGroup

    def __call__(self, state: Tensor, log_decay: Tensor, reverse: bool):
        """Start the exchange; see `chunk_hgrn2_sharded`.

        Args:
            state: [2 n, H, K, V] states of the two pieces of each of n sequences; n is the same on every rank.
            log_decay: [2 n, H, K] natural logs of the pieces' decays.
            reverse: whether these are gradients, which go backwards in time.

        Returns:
            A function that waits for the exchange and returns the states, or their gradients, that enter the pieces,
            [2 n, H, K, V].
        """
        cp, (pieces, H, K, V) = self.group.size(), state.shape
        share = -(-H * K // cp)
        own = [state.flatten(1, 2), log_decay.flatten(1, 2)[..., None]]
        if H * K < share * cp:
            own = [torch.nn.functional.pad(x, (0, 0, 0, share * cp - H * K)) for x in own]
        own = [x.unflatten(1, (cp, share)).unflatten(0, (-1, 2)).permute(2, 1, 0, 3, 4) for x in own]
        # [cp, 2, n, share, V + 1]
        sent = torch.cat(own, -1).contiguous()
        # The first and second pieces of all ranks, in the order of time.
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

        return _start_on_side_stream(exchange, sent)

    def _all_to_all(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        torch.distributed.all_to_all_single(received, x, group=self.group)
        return received


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _start_on_side_stream(work, sent: Tensor):
    """Start `work`, which reads `sent`, on a CUDA stream of its own, so that it overlaps with later kernels.

    Returns:
        A function that waits for the result of `work` and returns it. On a CPU this is `work` itself.
    """
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


def chunk_hgrn2_of_gathered(qfv: Tensor, lower_bound: Tensor | None, group: ProcessGroup, plan: GatherPlan) -> Tensor:
    """Gather each sequence on one rank, apply `chunk_hgrn2_fused` there and send the outputs back; differentiable.

    Args:
        qfv: [1, t, H, 3, K] raw projections of this rank's tokens of all these sequences, in the order that the plan
            sends them.
        lower_bound: [H, K] fp32, or None.
        group: ranks that share the sequences.
        plan: rank on which each sequence is gathered.

    Returns:
        o: [1, t, H, K] outputs of this rank's tokens, dtype of qfv.
    """
    received = [plan.sizes[group.rank()]] * group.size()
    x = all_to_all(group, qfv[0], received, plan.sizes)[None]
    x = permute(x, plan.order, plan.inverse)
    if x.shape[1]:
        o = chunk_hgrn2_fused(x, lower_bound, cu_seqlens=plan.cu_seqlens)[0]
    else:
        # No sequence is gathered on this rank. Its output still has to depend on the inputs, because the backward is a
        # collective operation that every rank must join.
        o = x[:, :, :, 0] if lower_bound is None else x[:, :, :, 0] + lower_bound.to(x.dtype)
    o = permute(o, plan.inverse, plan.order)
    return all_to_all(group, o[0], plan.sizes, received)[None]


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return x[:, order] of x [1, t, ...]; differentiable. The backward uses the inverse permutation."""
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


def bytes_sent(num_states: int, num_gathered: int, H: int, K: int, cp: int, itemsize: int) -> float:
    """Return how many bytes a rank sends to the others in a layer's forward and backward, as the mean over the ranks.

    Args:
        num_states: number of sequences whose states are exchanged. A whole stream counts as 1, however many documents
            it holds.
        num_gathered: number of tokens per rank that belong to gathered sequences.
        H, K: heads per rank, and channels per head.
        cp: number of context-parallel ranks.
        itemsize: bytes per number of q, f, v and o.
    """
    # A sequence has two pieces. For each piece the state and the decay are sent, and a state comes back. The channels
    # are padded, so that every rank takes the same number.
    states = num_states * 2 * -(-H * K // cp) * cp * (2 * K + 1) * 4
    # q, f and v are sent, and o comes back
    tokens = num_gathered * 4 * H * K * itemsize
    return 2 * (states + tokens) * (cp - 1) / cp
