"""`chunk_hgrn2_sharded` on a GPU: the operator's own launches, with the exchange between them."""

import torch

from hgrn2_kernels.chunk_triton import Launches
from hgrn2_kernels.strides import dense_like, unit_stride


def forward(q, f, v, lower_bound, hand_on, scale, pieces):
    """Returns o and the states that enter the pieces. Arguments as in `chunk_hgrn2_sharded`."""
    q, f, v = (unit_stride(x) for x in (q, f, v))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, None if pieces is None else pieces.cu_seqlens)
        wait, parts = _hand_on(run, v, lower_bound, hand_on, scale, pieces, reverse=False)
        entering = wait()
        rows = None if pieces is None else pieces.entered
        states, *_ = run.states(v, entering, wants_last=False, rows=rows, parts=parts)
        o = dense_like(v)
        run.output(v, states, o)
    return o, entering


def backward(do, q, f, v, lower_bound, entering, hand_on, scale, pieces, into):
    """Fills `into` with the gradients of q, f and v, and returns the bound's."""
    dq, df, dv = into
    q, f, v, do = (unit_stride(x) for x in (q, f, v, do))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, lower_bound, scale, None if pieces is None else pieces.cu_seqlens)
        wait, parts = _hand_on(run, do, lower_bound, hand_on, scale, pieces, reverse=True)
        # goes on during the exchange
        rows = None if pieces is None else pieces.entered
        states, *_ = run.states(v, entering, wants_last=False, rows=rows)
        rows = None if pieces is None else pieces.left
        dstates, *_ = run.states(do, wait(), reverse=True, wants_last=False, rows=rows, parts=parts)
        run.output(do, dstates, dv, reverse=True)
        return run.gradients(v, do, states, dstates, dq, df)


def _hand_on(run, y, lower_bound, hand_on, scale, pieces, reverse):
    """Start the exchange; returns the function that waits for it, and what `run` may use of the sums again."""
    own = run
    if pieces is not None and (pieces.heads if reverse else pieces.tails) is not None:
        own = Launches(run.q, run.f, y, lower_bound, scale, pieces.borders(reverse))
    state, log_decay, parts = own.totals(y, reverse)
    if pieces is not None:
        state, log_decay = pieces.choose(state, log_decay, reverse)
    return hand_on(state, log_decay, reverse), parts if own is run else None
