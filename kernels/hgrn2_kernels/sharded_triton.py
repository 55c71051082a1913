"""The function `chunk_hgrn2_sharded` on a GPU: the launches of the operator, with the exchange between them."""

import torch

from hgrn2_kernels.chunk_triton import Launches
from hgrn2_kernels.strides import dense_like, unit_stride


def forward(inputs, hand_on, pieces):
    """Return o and the states that enter the pieces. hand_on and pieces are as in `chunk_hgrn2_sharded`."""
    q, f, v = (unit_stride(x) for x in inputs[:3])
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        wait, totals = _hand_on(run, v, inputs, hand_on, pieces, reverse=False)
        entering = wait()
        rows = None if pieces is None else pieces.entered
        states, *_ = run.states(v, entering, wants_final=False, rows=rows, totals=totals)
        o = dense_like(v)
        run.output(v, states, o)
    return o, entering


def backward(do, inputs, entering, hand_on, pieces, into):
    """Write the gradients of q, f and v to `into`, and return the gradient of the bound."""
    dq, df, dv = into
    q, f, v, do = (unit_stride(x) for x in (*inputs[:3], do))
    with torch.cuda.device_of(q):
        run = Launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        wait, totals = _hand_on(run, do, inputs, hand_on, pieces, reverse=True)
        # this runs during the exchange
        rows = None if pieces is None else pieces.entered
        states, *_ = run.states(v, entering, wants_final=False, rows=rows)
        rows = None if pieces is None else pieces.left
        dstates, *_ = run.states(do, wait(), reverse=True, wants_final=False, rows=rows, totals=totals)
        run.output(do, dstates, dv, reverse=True)
        return run.gradients(v, do, states, dstates, dq, df)


def _hand_on(run, y, inputs, hand_on, pieces, reverse):
    """Start the exchange. Return the function that waits for it, and the totals that `run` may use again."""
    own = run
    if pieces is not None and (pieces.first_tokens if reverse else pieces.last_tokens) is not None:
        own = Launches(run.q, run.f, y, inputs.lower_bound, inputs.scale, pieces.borders(reverse))
    state, log_decay, totals = own.totals(y, reverse)
    if pieces is not None:
        state, log_decay = pieces.choose(state, log_decay, reverse)
    return hand_on(state, log_decay, reverse), totals if own is run else None
