"""The chunkwise form of HGRN2 in plain PyTorch: matrix products within a chunk, and one state per chunk.

Dimensions:
    B batch   T time   H heads   K key and gate dim   V value dim   N sequences
    NC chunks of all sequences   C tokens per chunk   M = NC * H   s tokens per span   P = C / 2s pairs of spans

The form is exact for gates of any strength. Query i meets key j through the product of the forget gates of tokens
j+1 .. i. A matrix product needs this as one factor for i and one for j, and one of the two factors overflows unless the
product is split at a token between j and i. So the scores are computed at levels s = 1, 2, 4 .. C/2. At each level the
chunk is cut into pairs of spans of s tokens:

    queries of the second span carry the gates from its start through i,
    keys of the first span carry the gates from j+1 through its end,

and each pair i > j meets at exactly one level. When s doubles, the rows of one span are multiplied by the total of the
other span, so a level costs one multiplication per element and no exponential. After the last level, queries carry the
gates since the start of the chunk, and keys carry the gates to its end. These are the factors with which queries read
the state and keys are written to it.

All factors lie in [0, 1], and the gradient of a gate is a sum of exactly the terms that contain it. So nothing
overflows or cancels, there is no division, and a gate that closes completely is an ordinary zero.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels.checks import borders_on_host
from hgrn2_kernels.gate import forget_gate, forget_gate_backward
from hgrn2_kernels.inputs import Inputs

# Tokens per chunk, a power of two. On two CPU cores, 32 and 64 take the same time, and 16 and 128 take more. With 64
# there are half as many sequential steps as with 32.
CHUNK_SIZE = 64


def forward(inputs: Inputs):
    """Return o and the final state."""
    q, f, v, lower_bound, initial_state, cu_seqlens, scale = inputs
    with torch.autocast(q.device.type, enabled=False):
        chunks, K, V = ChunkLayout(q, cu_seqlens), q.shape[-1], v.shape[-1]
        qc, kc, forget = _activate(chunks, q, f, lower_bound, scale)
        vc = chunks.split(v)
        h = chunks.split_states(initial_state, K, V)
        scores, total = _scores(qc, kc, forget)
        o = torch.bmm(scores, vc)
        for active, rows in chunks.steps:
            o[rows].baddbmm_(qc[rows], h[:active])
            h[:active].mul_(total[rows]).baddbmm_(kc[rows].mT, vc[rows])
        return chunks.join(o, v.dtype), chunks.join_states(h)


def backward(do, dht, inputs: Inputs):
    """Return the gradients of q, f, v, lower_bound and the initial state, or None for an input that is None.

    Everything that the forward computed is computed again from its inputs.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dht: [N, H, K, V], gradient of the final state.
        inputs: the inputs of the forward.
    """
    q, f, v, lower_bound, initial_state, cu_seqlens, scale = inputs
    with torch.autocast(q.device.type, enabled=False):
        chunks, K, V = ChunkLayout(q, cu_seqlens), q.shape[-1], v.shape[-1]
        # q and k before the gates of other tokens are multiplied in
        q_own, k_own, forget = _activate(chunks, q, f, lower_bound, scale)
        qc, kc = q_own.clone(), k_own.clone()
        vc, do = chunks.split(v), chunks.split(do)
        levels = []
        scores, total = _scores(qc, kc, forget, levels)

        h = chunks.split_states(initial_state, K, V)
        h_in = h.new_empty(len(qc), *h.shape[1:])
        for active, rows in chunks.steps:
            h_in[rows] = h[:active]
            h[:active].mul_(total[rows]).baddbmm_(kc[rows].mT, vc[rows])

        dscores = torch.bmm(do, vc.mT)
        dv = torch.bmm(scores.mT, do)
        dq = torch.bmm(do, h_in.mT)
        dk = torch.empty_like(dq)
        dh = chunks.split_states(dht, K, V)
        for active, rows in reversed(chunks.steps):
            dk[rows] = torch.bmm(vc[rows], dh[:active].mT)
            dv[rows].baddbmm_(kc[rows], dh[:active])
            h_in[rows] *= dh[:active]
            dh[:active].mul_(total[rows]).baddbmm_(qc[rows].mT, do[rows])
        # h_in has become h_in * dh, because the total of a chunk scales the state that enters it
        dtotal = h_in.sum(-1)

        dforget = _scores_backward(levels, dscores, dq, dk, dtotal)
        dself = dscores.diagonal(dim1=1, dim2=2)[..., None]
        dforget.addcmul_(dq, q_own)
        dq.mul_(forget).addcmul_(dself, k_own)
        dk.addcmul_(dself, q_own)
        dq, df, db = _activate_backward(chunks, q, f, lower_bound, scale, dq, dk, dforget)
        dinitial = None if initial_state is None else chunks.join_states(dh)
        return *(chunks.join(x, q.dtype) for x in (dq, df, dv)), db, dinitial


def _activate(chunks, q, f, lower_bound, scale):
    """Return scaled queries, keys and forget gates, each [M, C, K] in the accumulation dtype, from raw projections."""
    q = chunks.split(q)
    # a padding row has an open gate and a zero query, so it does not change the state
    forget, k = forget_gate(chunks.split(f, padding=torch.inf), chunks.broadcast(lower_bound))
    return F.silu(q).mul_(scale), k, forget


def _activate_backward(chunks, q, f, lower_bound, scale, dq, dk, dforget):
    """Return the gradients of `_activate` with respect to raw q and f, in chunks, and to the bound [H, K]."""
    q = chunks.split(q)
    s = q.sigmoid()
    # silu'(q) = s (1 + q (1 - s)) = s + silu(q) (1 - s)
    silu = q.mul_(s)
    dq.mul_(torch.addcmul(s, silu, 1 - s).mul_(scale))
    bound = chunks.broadcast(lower_bound)
    df, db = forget_gate_backward(chunks.split(f, padding=torch.inf), bound, dforget, dk)
    return dq, df, None if db is None else db.sum(1).unflatten(0, (-1, chunks.H)).sum(0)


def _scores(q, k, forget, levels=None):
    """Compute the decayed scores within each chunk, q_i * (gates of j+1 .. i) * k_j, level by level.

    Args:
        q: [M, C, K] scaled queries; multiplied in place by the gates from the start of the chunk through their token.
        k: [M, C, K] keys; multiplied in place by the gates from the next token through the end of the chunk.
        forget: [M, C, K] forget gates.
        levels: a list that receives what `_scores_backward` needs from each level; None to keep nothing.

    Returns:
        scores: [M, C, C], zero above the diagonal.
        total: [M, K, 1], product of the gates of the chunk.
    """
    M, C, K = q.shape
    scores = q.new_zeros(M, C, C)
    scores.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, k))
    q *= forget
    total, spent = forget, k
    for s in _span_sizes(C):
        q2, k1 = _second(q, s), _first(k, s)
        if levels is not None:
            levels.append((s, q2.clone(), k1.clone(), total))
        _second_by_first(scores, s).copy_(torch.matmul(q2, k1.mT))
        first, second = total.view(M, -1, 2, 1, K).unbind(2)
        first_spent, second_spent = spent.view(M, -1, 2, 1, K).unbind(2)
        spent = torch.addcmul(first_spent, first, second_spent)
        q2 *= first
        k1 *= second
        total = first * second
    # Gates near 1 are rounded. If the gate of a channel hardly changes, it is rounded in the same direction at each
    # token, and the error grows with the length of the memory. `spent`, the part that the gates take away, is a sum of
    # positive terms, which stays accurate until it is rounded here, once per chunk. Where most of the state is taken
    # away, the product of the gates is the more accurate one.
    total = torch.where(spent < 0.5, 1 - spent, total)
    return scores, total.view(M, K, 1)


def _scores_backward(levels, dscores, dq, dk, dtotal):
    """Return the gradients of the gates from the levels of `_scores`, last level first.

    Args:
        levels: the list that `_scores` filled.
        dscores: [M, C, C], gradient of the scores; only entries below the diagonal are read.
        dq: [M, C, K], gradient of the decayed queries; overwritten with the gradient of the queries times their own
            gates.
        dk: [M, C, K], gradient of the decayed keys; overwritten with the gradient of the keys, without the diagonal.
        dtotal: [M, K], gradient of the product of the gates of the chunk.

    Returns:
        dforget: [M, C, K], the part of the gradient of each gate that does not pass through its own query.
    """
    M, C, K = dq.shape
    dtotal = dtotal.view(M, 1, 1, K)
    for s, q2, k1, total in reversed(levels):
        dq2, dk1, dscore = _second(dq, s), _first(dk, s), _second_by_first(dscores, s)
        first, second = total.view(M, -1, 2, 1, K).unbind(2)
        dfirst = (dq2 * q2).sum(2, keepdim=True).addcmul_(dtotal, second)
        dsecond = (dk1 * k1).sum(2, keepdim=True).addcmul_(dtotal, first)
        dq2.mul_(first).add_(torch.matmul(dscore, k1))
        dk1.mul_(second).add_(torch.matmul(dscore.mT, q2))
        dtotal = torch.stack((dfirst, dsecond), 2).view(M, -1, 1, K)
    return dtotal.view(M, C, K)


def _span_sizes(C):
    return [1 << i for i in range(C.bit_length() - 1)]


def _first(x, s):
    """Return a view of the first span of every pair: [M, C, K] -> [M, P, s, K]."""
    return x.view(x.shape[0], -1, 2, s, x.shape[-1])[:, :, 0]


def _second(x, s):
    """Return a view of the second span of every pair: [M, C, K] -> [M, P, s, K]."""
    return x.view(x.shape[0], -1, 2, s, x.shape[-1])[:, :, 1]


def _second_by_first(x, s):
    """Return a view of the scores of queries in second spans and keys in first spans: [M, C, C] -> [M, P, s, s]."""
    P = x.shape[-1] // (2 * s)
    return x.view(-1, P, 2, s, P, 2, s)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _no_view(x):
    """Return x such that autograd does not take it for a view.

    Autograd refuses changes in place, such as `o += residual`, of an operator's result that is a view.
    """
    return torch.ops.aten._unsafe_view(x, x.shape) if x._is_view() else x


class ChunkLayout:
    """The mapping between the tokens of all sequences and one list of chunks.

    The list holds chunk 0 of every sequence, then chunk 1 of every sequence that has one, and so on. Longer sequences
    come first. So the sequences that still have a chunk at step n are a prefix of the states, and their chunks are
    consecutive.

    Attributes:
        H: heads.
        end: number of tokens of a row that belong to a sequence. Later tokens are in no chunk, and `join` returns
            zeros for them.
        steps: for each n, the number of (sequence, head) states that take part, and the slice of their rows among M.
    """

    def __init__(self, x: Tensor, cu_seqlens: Tensor | None):
        self.B, self.T, self.H, _ = x.shape
        self.device = x.device
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        packed = cu_seqlens is not None
        borders = borders_on_host(cu_seqlens, self.T) if packed else [0, self.T]
        lengths = [b - a for a, b in itertools.pairwise(borders)] * self.B
        self.end = borders[-1]
        self.C = min(CHUNK_SIZE, 1 << max(0, max(lengths) - 1).bit_length())
        self.N = len(lengths)
        counts = [-(-length // self.C) for length in lengths]
        order = sorted(range(self.N), key=lambda i: -counts[i])

        self.NC, first, self.steps = 0, [], []
        active = self.N
        for n in range(max(counts)):
            while counts[order[active - 1]] <= n:
                active -= 1
            first.append(self.NC)
            self.NC += active
            self.steps.append((active * self.H, slice(first[n] * self.H, self.NC * self.H)))

        self.order = self.chunk = None
        if packed:
            order, lengths, first = (torch.tensor(y, dtype=torch.int64) for y in (order, lengths, first))
            rank = order.argsort()
            position = torch.arange(self.end) - torch.repeat_interleave(torch.tensor(borders[:-1]), lengths)
            chunk = first[position // self.C] + torch.repeat_interleave(rank, lengths)
            self.order, self.rank = order.to(x.device), rank.to(x.device)
            self.chunk, self.row = chunk.to(x.device), (position % self.C).to(x.device)

    def split(self, x: Tensor, padding: float = 0.0) -> Tensor:
        """Copy x [B, T, H, D] to chunks [M, C, D] in the accumulation dtype. Rows without a token hold `padding`."""
        D = x.shape[-1]
        if self.chunk is not None:
            out = x.new_full((self.NC, self.H, self.C, D), padding, dtype=self.dtype)
            out.transpose(1, 2)[self.chunk, self.row] = x[0, : self.end].to(self.dtype)
        else:
            out = x.new_empty(self.NC, self.H, self.C, D, dtype=self.dtype)
            if self.T % self.C:
                x = F.pad(x, (0, 0, 0, 0, 0, -self.T % self.C), value=padding)
            self._by_sequence(out).copy_(x.unflatten(1, (-1, self.C)))
        return out.flatten(0, 1)

    def join(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy chunks x [M, C, D] back to tokens [B, T, H, D]."""
        x = x.unflatten(0, (self.NC, self.H))
        if self.chunk is not None:
            x = x.transpose(1, 2)[self.chunk, self.row].to(dtype)[None]
            return _no_view(F.pad(x, (0, 0, 0, 0, 0, self.T - self.end)) if self.end < self.T else x)
        out = x.new_empty(self.B, self.NC // self.B, self.C, self.H, x.shape[-1], dtype=dtype)
        out.copy_(self._by_sequence(x))
        return _no_view(out.flatten(1, 2)[:, : self.T].contiguous())

    def _by_sequence(self, x: Tensor) -> Tensor:
        """Return a view of dense chunks: [NC, H, C, D] -> [B, NC / B, C, H, D]."""
        return x.unflatten(0, (-1, self.B)).permute(1, 0, 3, 2, 4)

    def split_states(self, state: Tensor | None, K: int, V: int) -> Tensor:
        """Copy states [N, H, K, V], or zeros for None, to [N * H, K, V] in the order of the steps."""
        if state is None:
            return torch.zeros(self.N * self.H, K, V, dtype=self.dtype, device=self.device)
        # both branches copy, because the steps update the states in place
        copy = state.clone(memory_format=torch.contiguous_format) if self.order is None else state[self.order]
        return copy.flatten(0, 1)

    def join_states(self, state: Tensor) -> Tensor:
        """Put states back into the order of the sequences: [N * H, K, V] -> [N, H, K, V]. It undoes `split_states`."""
        state = state.unflatten(0, (self.N, self.H))
        return _no_view(state if self.order is None else state[self.rank])

    def broadcast(self, lower_bound: Tensor | None) -> Tensor | None:
        """Return the bound of every chunk: [H, K] -> [M, 1, K]."""
        return None if lower_bound is None else lower_bound.repeat(self.NC, 1)[:, None]
