"""The states that the shards of a split sequence need from each other: `shard_states` and `combine_states`.

A shard turns the state h that enters it into exp(log_decay) h + state, whatever the queries are. So all shards compute
log_decay and state from their own tokens at the same time, and exchange both. Each shard combines the results of the
shards before it into the state that enters it, and runs `chunk_hgrn2` from this state.

The weight of a token in the state is its key times the gates after it, exp(sum of their logs). That is a sum of terms
of one sign and an exponent of at most 0. So nothing cancels or overflows, and a gate that closes completely gives 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hgrn2_kernels import op, torch_ops
from hgrn2_kernels.checks import (
    check_cu_seqlens,
    check_inputs,
    check_kernels,
    check_like_state,
    check_transforms,
    shape_of,
)
from hgrn2_kernels.chunkwise import ChunkLayout
from hgrn2_kernels.gate import log_forget, log_forget_backward
from hgrn2_kernels.strides import dense_like


def shard_states(
    f: Tensor, v: Tensor, lower_bound: Tensor | None, *, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sum up the effect of each sequence, or shard of a sequence, on a state that enters it. Differentiable once.

    Args:
        f: [B, T, H, K] fp64, fp32, bf16 or fp16, raw forget-gate projection, any finite value.
        v: [B, T, H, V] dtype of f, values.
        lower_bound: [H, K] fp32 (fp64 with fp64 inputs), in [0, 1). None means a bound of 0. Its gradient is 0
            on channels where it is exactly 0, as in `chunk_hgrn2`.
        cu_seqlens: [N + 1] int32, boundaries of sequences packed along T, as in `chunk_hgrn2`.

    Returns:
        state: [N, H, K, V] fp32 (fp64 with fp64 inputs), state after the last token if it is 0 before the first.
        log_decay: [N, H, K] dtype of state, sum of log forget over the tokens, in nats. It is at most 0 and finite, and
            0 for an empty sequence. In the Triton kernels the log of one gate is at least -125 log 2.

    Raises:
        ValueError: a shape, dtype, device or boundary is not as described.
        NotImplementedError: a derivative is asked for that `chunk_hgrn2` does not have.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2, unrolled over the tokens of a shard.
    """
    check_inputs(f, f, v)
    check_transforms(f, v, lower_bound)
    if lower_bound is not None:
        check_like_state("lower_bound", lower_bound, f.shape[2:], f)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, f)
    if op.implementation(f.device, f.dtype) == "triton":
        check_kernels(f, v)
    return torch.ops.hgrn2.shard_states(f, v, lower_bound, cu_seqlens)


def combine_states(states: Tensor, log_decays: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Step the state through consecutive shards, h_{m+1} = exp(log_decay_m) h_m + state_m. Differentiable.

    Args:
        states: [M, N, H, K, V] fp32 or fp64, the results of `shard_states` for M shards, in the order of time.
        log_decays: [M, N, H, K] dtype of states, the log decays of these shards, in nats.
        initial_state: [N, H, K, V] dtype of states, state before the first shard. None means zeros.

    Returns:
        entering: [M, N, H, K, V] dtype of states, state before each shard, which is the initial_state of
            its `chunk_hgrn2`.
        final_state: [N, H, K, V] dtype of states, state after the last shard.

    Raises:
        ValueError: a shape, dtype or device is not as described.

    Source:
        Qin et al., HGRN2, arXiv 2404.07904, section 3.2, unrolled over shards.
    """
    if states.dim() != 5 or log_decays.shape != states.shape[:-1] or not len(states):
        raise ValueError(
            f"states must be [M, N, H, K, V] and log_decays [M, N, H, K], got {shape_of(states)} and "
            f"{shape_of(log_decays)}: stack the results of shard_states"
        )
    others = [("log_decays", log_decays)]
    if initial_state is not None:
        others.append(("initial_state", initial_state))
        if initial_state.shape != states.shape[1:]:
            raise ValueError(
                f"initial_state must be {shape_of(states[0])} to match states, got {shape_of(initial_state)}: "
                "reshape or slice it"
            )
    for name, x in others:
        if x.dtype != states.dtype or x.device != states.device:
            raise ValueError(
                f"{name} must be {states.dtype} on {states.device} like states, got {x.dtype} on {x.device}: move it"
            )

    # shard m includes the effect of the `reach` shards before it, and then covers twice as many
    reach = 1
    while reach < len(states):
        passing = log_decays[reach:].exp()[..., None] * states[:-reach]
        states = torch.cat([states[:reach], states[reach:] + passing])
        log_decays = torch.cat([log_decays[:reach], log_decays[reach:] + log_decays[:-reach]])
        reach *= 2
    if initial_state is None:
        before = torch.zeros_like(states[:1])
    else:
        before = initial_state[None]
        states = states + log_decays.exp()[..., None] * before
    return torch.cat([before, states[:-1]]), states[-1]


def _forward(f, v, lower_bound, cu_seqlens):
    """Compute `shard_states` in PyTorch."""
    with torch.autocast(f.device.type, enabled=False):
        chunks = ChunkLayout(f, cu_seqlens)
        k, weight, log_decay = _decays(chunks, *_split_gate(chunks, f, lower_bound))
        k, v = k.mul_(weight), chunks.split(v)
        h = chunks.split_states(None, k.shape[-1], v.shape[-1])
        for active, rows in chunks.steps:
            h[:active].baddbmm_(k[rows].mT, v[rows])
        return chunks.join_states(h), chunks.join_states(log_decay)


def _backward(dstate, dlog_decay, f, v, lower_bound, cu_seqlens):
    """Return the gradients of f, v and lower_bound (None without a bound). It needs only the inputs of the forward."""
    with torch.autocast(f.device.type, enabled=False):
        chunks, dtype = ChunkLayout(f, cu_seqlens), f.dtype
        f, bound = _split_gate(chunks, f, lower_bound)
        k, weight, _ = _decays(chunks, f, bound)
        k, v = k.mul_(weight), chunks.split(v)
        dh = chunks.split_states(dstate, k.shape[-1], v.shape[-1])
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for active, rows in chunks.steps:
            torch.bmm(v[rows], dh[:active].mT, out=dk[rows])
            torch.bmm(k[rows], dh[:active], out=dv[rows])
        # a gate decays the keys before it, and the state that entered the shard
        dg, total = _sum_before(k.mul_(dk))
        before = chunks.split_states(dlog_decay[..., None], 1, 1).mT
        for active, rows in chunks.steps:
            dg[rows] += before[:active]
            before[:active] += total[rows]
        df, db = log_forget_backward(f, bound, dg, dk.mul_(weight))
        db = None if db is None else db.sum(1).unflatten(0, (-1, chunks.H)).sum(0)
        return chunks.join(df, dtype), chunks.join(dv, dtype), db


def _split_gate(chunks, f, lower_bound):
    """Return the raw gate in chunks, padded with open gates, and the bound of every chunk."""
    return chunks.split(f, padding=torch.inf), chunks.broadcast(lower_bound)


def _decays(chunks, f, bound):
    """Return the keys, the weights that later gates leave them, and the log decay of each sequence.

    Args:
        chunks: the mapping between sequences and chunks.
        f: [M, C, K] raw gate, in chunks.
        bound: [M, 1, K] or None.

    Returns:
        k: [M, C, K].
        weight: [M, C, K], product of the gates of all later tokens of the sequence.
        log_decay: [N * H, K], in the order of the steps.
    """
    g, k = log_forget(f, bound)
    # the chunks are flipped, so "before" means after
    after, total = _sum_before(g.flip(1))
    after = after.flip(1)
    later = chunks.split_states(None, 1, f.shape[-1])
    for active, rows in reversed(chunks.steps):
        after[rows] += later[:active]
        later[:active] += total[rows]
    # clamped, because a sum of gates near the most negative number is infinite
    return k, after.exp_(), later[:, 0].clamp_min(torch.finfo(g.dtype).min)


def _sum_before(x):
    """Sum x [M, C, K] over the earlier tokens of each chunk, and over all of them: [M, C, K] and [M, 1, K]."""
    # subtracting x from its cumulative sum instead would cancel and lose digits
    total = x.cumsum(1)
    return F.pad(total[:, :-1], (0, 0, 1, 0)), total[:, -1:]


def _implementation(f):
    """Return the functions `forward` and `backward` for these inputs."""
    if op.implementation(f.device, f.dtype) == "triton":
        # a CPU needs no triton
        from hgrn2_kernels import shard_states_triton

        return shard_states_triton.forward, shard_states_triton.backward
    return _forward, _backward


def _run(f, v, lower_bound, cu_seqlens):
    return _implementation(f)[0](f, v, lower_bound, cu_seqlens)


def _run_backward(dstate, dlog_decay, f, v, lower_bound, cu_seqlens):
    df, dv, dbound = _implementation(f)[1](dstate, dlog_decay, f, v, lower_bound, cu_seqlens)
    return df, dv, torch_ops.or_empty(dbound, f)


def _fake(f, v, lower_bound, cu_seqlens):
    _, _, H, K = f.shape
    N = f.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = torch.float64 if f.dtype == torch.float64 else torch.float32
    return f.new_empty((N, H, K, v.shape[-1]), dtype=dtype), f.new_empty((N, H, K), dtype=dtype)


def _fake_backward(dstate, dlog_decay, f, v, lower_bound, cu_seqlens):
    dbound = None if lower_bound is None else lower_bound.new_empty(lower_bound.shape)
    like = dense_like if op.implementation(f.device, f.dtype) == "triton" else lambda x: x.new_empty(x.shape)
    return like(f), like(v), torch_ops.or_empty(dbound, f)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dstate, dlog_decay):
    inputs = ctx.saved_tensors
    df, dv, dbound = torch.ops.hgrn2.shard_states_backward(dstate, dlog_decay, *inputs)
    return df, dv, None if inputs[2] is None else dbound, None


torch_ops.define(
    "shard_states(Tensor f, Tensor v, Tensor? lower_bound, Tensor? cu_seqlens) -> (Tensor state, Tensor log_decay)",
    _run,
    _fake,
)
torch_ops.define(
    "shard_states_backward(Tensor dstate, Tensor dlog_decay, Tensor f, Tensor v, Tensor? lower_bound,"
    " Tensor? cu_seqlens) -> (Tensor df, Tensor dv, Tensor dlower_bound)",
    _run_backward,
    _fake_backward,
)
torch_ops.differentiate("shard_states", _differentiate, _setup_context)
