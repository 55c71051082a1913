"""The chunkwise form of HGRN2 in plain PyTorch: matrix products within a chunk, one state a chunk.

Dimension key:
    B batch   T time   H heads   K key and gate dim   V value dim   N sequences
    NC chunks of all sequences   C tokens a chunk   M = NC * H   s tokens a block   P = C / 2s pairs of blocks

No gate is too strong. Query i meets key j through the product of the forget gates of tokens j+1 .. i, which a
matrix product needs as one factor for i and one for j; split anywhere but between the two, one factor
overflows. So there are levels s = 1, 2, 4 .. C/2. At each, the chunk is cut into pairs of blocks of s tokens:

    queries of the second block carry the gates from its start through i,
    keys of the first block carry the gates from j+1 through its end,

and each i > j meets at exactly one level. Doubling s multiplies the rows of one block by the total of the
other, so a level costs one multiplication an element and no exponential. After the last level queries carry
the gates since the chunk's start and keys those to its end: what reading and writing the state need.

All factors lie in [0, 1], and a gate's gradient sums exactly the terms that hold it: nothing overflows or
cancels, nothing is divided by, and a gate that closes completely is an ordinary zero.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels.checks import borders_on_host
from hgrn2_kernels.gate import forget_gate, forget_gate_backward

# a power of two; on two CPU cores 32 and 64 take the same time and 16 and 128 more, and the larger of the two
# has half the sequential steps
CHUNK_SIZE = 64


def forward(q, f, v, lower_bound, initial_state, cu_seqlens, scale):
    """o and the final state. Arguments as in `chunk_hgrn2`."""
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


def backward(do, dht, q, f, v, lower_bound, initial_state, cu_seqlens, scale):
    """Gradients of q, f, v, lower_bound and the initial state, None for what is not there.

    Of the forward its inputs are enough; the rest is computed again.

    Args:
        do: [B, T, H, V] dtype of v, gradient of o.
        dht: [N, H, K, V], of the final state.
        q, f, v, lower_bound, initial_state, cu_seqlens, scale: of the forward.
    """
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
        # h_in has become h_in * dh: the total of a chunk scales the state that enters it
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
    """Raw projections to scaled queries, keys and forget gates, each [M, C, K] in the accumulation dtype."""
    q = chunks.split(q)
    # an open gate and a zero query make a padding row: it leaves the state alone
    forget, k = forget_gate(chunks.split(f, padding=torch.inf), chunks.broadcast(lower_bound))
    return F.silu(q).mul_(scale), k, forget


def _activate_backward(chunks, q, f, lower_bound, scale, dq, dk, dforget):
    """Gradients of `_activate` with respect to raw q and f, in chunks, and to the bound, [H, K]."""
    q = chunks.split(q)
    s = q.sigmoid()
    # silu'(q) = s (1 + q (1 - s)) = s + silu(q) (1 - s)
    silu = q.mul_(s)
    dq.mul_(torch.addcmul(s, silu, 1 - s).mul_(scale))
    bound = chunks.broadcast(lower_bound)
    df, db = forget_gate_backward(chunks.split(f, padding=torch.inf), bound, dforget, dk)
    return dq, df, None if db is None else db.sum(1).unflatten(0, (-1, chunks.H)).sum(0)


def _scores(q, k, forget, levels=None):
    """Decayed scores within each chunk, q_i * (gates of j+1 .. i) * k_j, level by level.

    Args:
        q: [M, C, K] scaled queries; take on, in place, the gates from the chunk's start through their token.
        k: [M, C, K] keys; take on, in place, the gates from the next token through the chunk's end.
        forget: [M, C, K] forget gates.
        levels: a list that receives what `_scores_backward` needs of each level; None to keep nothing.

    Returns:
        scores: [M, C, C], zero above the diagonal.
        total: [M, K, 1], product of the chunk's gates.
    """
    M, C, K = q.shape
    scores = q.new_zeros(M, C, C)
    scores.diagonal(dim1=1, dim2=2).copy_(torch.linalg.vecdot(q, k))
    q *= forget
    total, spent = forget, k
    for s in _block_sizes(C):
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
    # gates near 1 are rounded, and a channel whose gate hardly changes is rounded the same way at each token:
    # the bias grows with the length of its memory. What the gates take away is a sum of positive terms, which
    # keeps its digits until this one rounding a chunk. Once most is gone, the product is the one with digits.
    total = torch.where(spent < 0.5, 1 - spent, total)
    return scores, total.view(M, K, 1)


def _scores_backward(levels, dscores, dq, dk, dtotal):
    """Undo the levels of `_scores`, last first.

    Args:
        levels: what `_scores` kept.
        dscores: [M, C, C], gradient of the scores; only entries below the diagonal are read.
        dq: [M, C, K], gradient of the decayed queries; becomes, in place, that of queries times own gates.
        dk: [M, C, K], gradient of the decayed keys; becomes, in place, that of keys, but for the diagonal.
        dtotal: [M, K], gradient of the chunk's product of gates.

    Returns:
        dforget: [M, C, K], the part of each gate's gradient that does not pass through its own query.
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


def _block_sizes(C):
    return [1 << i for i in range(C.bit_length() - 1)]


def _first(x, s):
    """View of the first block of every pair: [M, C, K] -> [M, P, s, K]."""
    return x.view(x.shape[0], -1, 2, s, x.shape[-1])[:, :, 0]


def _second(x, s):
    """View of the second block of every pair: [M, C, K] -> [M, P, s, K]."""
    return x.view(x.shape[0], -1, 2, s, x.shape[-1])[:, :, 1]


def _second_by_first(x, s):
    """View of the scores of second-block queries and first-block keys: [M, C, C] -> [M, P, s, s]."""
    P = x.shape[-1] // (2 * s)
    return x.view(-1, P, 2, s, P, 2, s)[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


class ChunkLayout:
    """How the tokens of all sequences map to one list of chunks, and back.

    Chunk n of every sequence that has one comes before chunk n + 1 of any, longest sequence first. So the
    sequences still running at step n are a prefix of the states, and their chunks are consecutive.

    Attributes:
        H: heads.
        end: tokens of a row that are in a sequence. Those behind it go into no chunk, and come back as zeros.
        steps: per n, how many (sequence, head) states take part, and the slice of their rows among the M.
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
        """Copy x: [B, T, H, D] to chunks [M, C, D] in the accumulation dtype; other rows are padding."""
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
        """Copy chunks x: [M, C, D] back to tokens [B, T, H, D]."""
        x = x.unflatten(0, (self.NC, self.H))
        if self.chunk is not None:
            x = x.transpose(1, 2)[self.chunk, self.row].to(dtype)[None]
            return F.pad(x, (0, 0, 0, 0, 0, self.T - self.end)) if self.end < self.T else x
        out = x.new_empty(self.B, self.NC // self.B, self.C, self.H, x.shape[-1], dtype=dtype)
        out.copy_(self._by_sequence(x))
        return out.flatten(1, 2)[:, : self.T].contiguous()

    def _by_sequence(self, x: Tensor) -> Tensor:
        """View of dense chunks: [NC, H, C, D] -> [B, NC / B, C, H, D]."""
        return x.unflatten(0, (-1, self.B)).permute(1, 0, 3, 2, 4)

    def split_states(self, state: Tensor | None, K: int, V: int) -> Tensor:
        """Copy states [N, H, K, V], or zeros for None, to [N * H, K, V] in the order of the steps."""
        if state is None:
            return torch.zeros(self.N * self.H, K, V, dtype=self.dtype, device=self.device)
        # a copy either way: the steps update states in place
        copy = state.clone(memory_format=torch.contiguous_format) if self.order is None else state[self.order]
        return copy.flatten(0, 1)

    def join_states(self, state: Tensor) -> Tensor:
        """Undo `split_states`."""
        state = state.unflatten(0, (self.N, self.H))
        return state if self.order is None else state[self.rank]

    def broadcast(self, lower_bound: Tensor | None) -> Tensor | None:
        """The bound of every chunk: [H, K] -> [M, 1, K]."""
        return None if lower_bound is None else lower_bound.repeat(self.NC, 1)[:, None]
