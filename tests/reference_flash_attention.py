"""A plain reference for flash-attn 2 with a paged cache of keys and values, which Megatron's dynamic engine needs.

It runs on any device. It is slow: each request gathers all its keys and values, and masks.
"""

import importlib.machinery
import sys
import types

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, length: int, table: Tensor, scale: float | None) -> Tensor:
    """Attend to the tokens of one request, of which the queries are the last ones.

    Args:
        q: [t, heads, dim].
        k, v: [blocks, block size, key heads, dim], the cache of all requests.
        length: number of keys, at least t.
        table: [blocks of a request], the numbers of its blocks in the cache.
        scale: factor of the scores; None takes dim ** -0.5.
    """
    blocks = table[: -(-length // k.shape[1])].long()
    k, v = (x[blocks].flatten(0, 1)[:length].repeat_interleave(q.shape[1] // x.shape[2], 1) for x in (k, v))
    positions = torch.arange(length, device=q.device)
    sees = positions[None] <= positions[length - len(q) :, None]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def check(causal: bool, window_size=(-1, -1), return_attn_probs=False, num_splits=0):
    """Refuse what the functions below do not compute."""
    assert causal and window_size == (-1, -1) and not return_attn_probs


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table, softmax_scale=None, **options
) -> Tensor:
    """Attend to prompts, or to parts of prompts: q is [t, heads, dim]."""
    check(**options)
    out, borders, lengths = torch.zeros_like(q), cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    for n, length in enumerate(lengths):
        start, end = borders[n : n + 2]
        if end > start:
            out[start:end] = attention(q[start:end], k, v, length, block_table[n], softmax_scale)
    return out


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale=None, **options) -> Tensor:
    """Attend to the last tokens of each request: q is [requests, t, heads, dim]. Padding has no keys, and gives 0."""
    check(**options)
    out = torch.zeros_like(q)
    for n, length in enumerate(cache_seqlens.tolist()):
        if length:
            out[n] = attention(q[n], k_cache, v_cache, length, block_table[n], softmax_scale)
    return out


def install() -> None:
    """Let this process import these functions as flash-attn 2. Megatron must not have been imported yet."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.__version__ = "2.8.0"
    module.flash_attn_varlen_func = flash_attn_varlen_func
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    sys.modules["flash_attn"] = module
