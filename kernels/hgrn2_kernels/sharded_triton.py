"""The function `chunk_hgrn2_sharded` on a GPU: the launches of the operator, with the exchange between them."""

import torch

from hgrn2_kernels import dispatch
from hgrn2_kernels.chunk_triton import Launches
from hgrn2_kernels.strides import dense_like


def forward(inputs, hand_on, pieces):
    """Return o and the states that enter the pieces. hand_on and pieces are as in `chunk_hgrn2_sharded`."""
    launches = dispatch.launches(inputs.q, inputs.v)
    q, f, v = launches.readable(*inputs[:3])
    with torch.cuda.device_of(q):
        run = launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        wait, totals = _hand_on(run, v, inputs, hand_on, pieces, reverse=False)
        entering = wait()
        rows = None if pieces is None else pieces.entered
        o = dense_like(v)
        run.run_forward(v, entering, o, wants_final=False, rows=rows, totals=totals)
    return o, entering


def backward(do, inputs, entering, hand_on, pieces, into):
    """Write the gradients of q, f and v to `into`, and return the gradient of the bound."""
    dq, df, dv = into
    launches = dispatch.launches(inputs.q, inputs.v)
    q, f, v, do = launches.readable(*inputs[:3], do)
    with torch.cuda.device_of(q):
        run = launches(q, f, v, inputs.lower_bound, inputs.scale, inputs.cu_seqlens)
        wait, totals = _hand_on(run, do, inputs, hand_on, pieces, reverse=True)
        # this runs during the exchange
        rows = None if pieces is None else pieces.entered
        states, *_ = run.states(v, entering, wants_final=False, rows=rows)
        rows = None if pieces is None else pieces.left
        dbound, _ = run.run_backward(v, do, states, wait(), dq, df, dv, wants_final=False, rows=rows, totals=totals)
        return dbound


def _hand_on(run, y, inputs, hand_on, pieces, reverse):
    """Start the exchange. Return the function that waits for it, and the totals that `run` may use again."""
    own = run
    if pieces is not None and (pieces.first_tokens if reverse else pieces.last_tokens) is not None:
        own = Launches(run.q, run.f, y, inputs.lower_bound, inputs.scale, pieces.borders(reverse))
    state, log_decay, totals = own.totals(y, reverse)
    if pieces is not None:
        state, log_decay = pieces.choose(state, log_decay, reverse)
    return hand_on(state, log_decay, reverse), totals if own is run else None
