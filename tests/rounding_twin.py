"""The operator in plain PyTorch with the kernels' roundings, to tell what error those alone cost.

Gates, sums and states' steps are fp32; operands of products and the states between chunks are rounded to the kernels'
operand dtype, forward and backward. A head's chunk is taken within the limit or exactly; where the kernels cut it into
bands, which round as often, it is the latter. Gradients are autograd's.
"""

import math

import torch
import torch.nn.functional as F

LN2 = math.log(2)
# as in hgrn2_kernels.triton_math
UNIT, LIMIT, LIMIT_FP32 = 512.0, 96.0, 20.0


def twin(q, f, v, lower_bound, *, initial_state, output_final_state=True, cu_seqlens=None, dtype, C):
    """`chunk_hgrn2` on q, f, v [B, T, H, K] of any dtype; dtype of operands, chunks of C tokens.

    Returns o [B, T, H, V] dtype of v, final_state [N, H, K, V] fp32.
    """
    if cu_seqlens is None:
        return _dense(q, f, v, lower_bound, initial_state, dtype, C)
    borders = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        state = initial_state[n : n + 1]
        if start < end:
            o, state = _dense(*(x[:, start:end] for x in (q, f, v)), lower_bound, state, dtype, C)
            outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states)


def _dense(q, f, v, lower_bound, h, dtype, C):
    B, T, H, K = q.shape
    pad, out_dtype = -T % C, v.dtype
    # [B, H, T, K], padded with tokens that change nothing
    q, f, v = (x.float().transpose(1, 2) for x in (q, f, v))
    q, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, v))
    f = F.pad(f, (0, 0, 0, pad), value=1e4)
    b = q.new_zeros(H, K) if lower_bound is None else lower_bound
    g, k = Gate.apply(f, b[:, None])
    a = q / (K**0.5 * (1 + torch.exp2(-q / LN2)))
    outputs = []
    for t in range(0, T + pad, C):
        o, h = _chunk(*(x[:, :, t : t + C] for x in (a, k, g, v)), h, dtype)
        outputs.append(o)
    return torch.cat(outputs, 2)[:, :, :T].transpose(1, 2).to(out_dtype), h


def _chunk(a, k, g, v, h, dtype):
    """One chunk of a, k, g [B, H, C, K], v [B, H, C, V] from state h [B, H, K, V]: its output and the next state.

    The state and its gradient meet operands in the frame of the chunk's middle, as far as the limit.
    """
    C = a.shape[2]
    i = torch.arange(C, device=a.device)
    through, after = (_decay(rows, g, dtype, exact=True) for rows in (i <= i[:, None], i > i[:, None]))
    half = through[:, :, -1:] / 2
    limit = LIMIT_FP32 if dtype == torch.float32 else LIMIT
    frame = half.detach().clamp_min(-limit)
    framed = torch.exp2(frame).mT * h
    slow = half.amin(-1, keepdim=True) < -limit
    o, scores = _within_limit(a, k, g, framed, half - frame, dtype)
    exact = Product.apply(Operand.apply(a, through - frame, dtype), framed, dtype), _exactly(a, k, g, dtype)
    o, scores = (torch.where(slow, x, y) for x, y in zip(exact, (o, scores), strict=True))
    written = Product.apply(Operand.apply(k, after - frame, dtype).mT, v, dtype)
    h = Passing.apply(h, 2 * half.mT, frame.mT, dtype) + torch.exp2(frame).mT * written
    return o + Product.apply(scores, v, dtype), h


def _within_limit(a, k, g, framed, rest, dtype):
    """What comes of the state, and the scores, by one product in the frame of the chunk's middle.

    rest, 0 within the limit, carries the gradient of the frame.
    """
    i = torch.arange(a.shape[2], device=a.device)
    sums = (i <= i[:, None]).float() - 0.5
    # where it exceeds the limit the result is not taken, and has to be a number
    decay = _decay(sums, g, dtype).clamp(-LIMIT, LIMIT)
    qd, kd = Operand.apply(a, decay, dtype), Operand.apply(k, -decay, dtype, True)
    scores = torch.where(i <= i[:, None], Product.apply(qd, kd.mT, dtype), 0.0)
    return Product.apply(qd, torch.exp2(rest).mT * framed, dtype), scores


def _exactly(a, k, g, dtype):
    """The scores level by level."""
    C = a.shape[2]
    i = torch.arange(C, device=a.device)
    scores = torch.diag_embed((a * k).sum(-1))
    for shift in range(C.bit_length() - 1):
        # between a token and the last one of the first half of its block
        ref = ((i >> shift + 1 << shift + 1) + (1 << shift) - 1)[:, None]
        sums = ((i > ref) & (i <= i[:, None])) | ((i > i[:, None]) & (i <= ref))
        second = ((i >> shift) & 1 != 0)[:, None]
        operand = Operand.apply(torch.where(second, a, k), _decay(sums, g, dtype, exact=True), dtype)
        meet = (i[:, None] ^ i) >> shift == 1
        scores = scores + torch.where(meet & second, Product.apply(operand, operand.mT, dtype), 0.0)
    return scores


def _decay(rows, g, dtype, exact=False):
    """Sums of log gates g [B, H, C, K], of the digits that the kernels take, by a matrix [C, C] of 0, 1 and -1."""
    return rows.float() @ (g if dtype == torch.float32 else Rounded.apply(g, exact))


class Gate(torch.autograd.Function):
    """Log2 of the forget gate and the key, by powers of two in fp32, and their gradients as the kernels take them."""

    @staticmethod
    def forward(ctx, f, b):
        e = torch.exp2((f / LN2).clamp(-125, 125))
        r = 1 / (1 + e)
        k = (1 - b) * r
        ctx.save_for_backward(b, e, r, k)
        # near 1 a logarithm is exact to 2^-24 of 1, not of itself
        return torch.where(k < 0.5, torch.log1p(-k.clamp_max(0.5)) / LN2, torch.log2((b + e) * r)), k

    @staticmethod
    def backward(ctx, dg, dk):
        b, e, r, k = ctx.saved_tensors
        dg, share = dg / LN2, 1 / (b + e)
        db = torch.where(b > 0, dg * share - dk * r, 0.0)
        return k * (dg * (e * share) - dk * (e * r)), db.sum((0, 2))[:, None]


class Rounded(torch.autograd.Function):
    """Log gates as an fp16 number of UNIT to a power of two, or the sum of two where exact; the gradient passes."""

    @staticmethod
    def forward(ctx, g, exact):
        units = g * UNIT
        high = units.half().float()
        low = (units - high).half().float() if exact else 0
        return (high + low) / UNIT

    @staticmethod
    def backward(ctx, dg):
        return dg, None


class Operand(torch.autograd.Function):
    """x 2^decay, rounded; the decay's gradient holds the rounded number, as the kernels' sums of pairs do.

    With `twice` x's own gradient holds it too: where the kernels keep the product of a key and its gradient.
    """

    @staticmethod
    def forward(ctx, x, decay, dtype, twice=False):
        factor = torch.exp2(decay)
        rounded = (x * factor).to(dtype).float()
        ctx.save_for_backward(torch.where(x > 0, rounded / x, factor) if twice else factor, rounded)
        return rounded

    @staticmethod
    def backward(ctx, d):
        factor, rounded = ctx.saved_tensors
        return d * factor, d * rounded * LN2, None, None


class Passing(torch.autograd.Function):
    """h 2^decay for h [B, H, K, V]; the decay's gradient is a product of states as the kernels store them."""

    @staticmethod
    def forward(ctx, h, decay, frame, dtype):
        ctx.save_for_backward(h, decay, frame)
        ctx.dtype = dtype
        return torch.exp2(decay) * h

    @staticmethod
    def backward(ctx, dh):
        h, decay, frame = ctx.saved_tensors
        stored, dstored = ((torch.exp2(frame) * x).to(ctx.dtype).float() for x in (h, dh))
        ddecay = torch.exp2(decay - 2 * frame) * (stored * dstored).sum(-1, keepdim=True)
        return torch.exp2(decay) * dh, ddecay * LN2, None, None


class Product(torch.autograd.Function):
    """a b of rounded operands, the gradient of the result being one of them in the backward."""

    @staticmethod
    def forward(ctx, a, b, dtype):
        a, b = a.to(dtype).float(), b.to(dtype).float()
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    def backward(ctx, d):
        a, b = ctx.saved_tensors
        d = d.to(ctx.dtype).float()
        return d @ b.mT, a.mT @ d, None
