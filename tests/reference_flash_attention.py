"""A plain reference for flash-attn 2, which Megatron's dynamic engine and fla's attention layers need.

It runs on any device, in fp32, with gradients. It is slow: each sequence gathers all its keys and values, and masks.
"""

import importlib.machinery
import sys
import types

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: int) -> Tensor:
    """Attend to the tokens of one sequence. The queries belong to its last tokens.

    Args:
        q: [t, heads, dim].
        k, v: [length, key heads, dim], with a length of at least t.
        scale: factor of the scores; None takes dim ** -0.5.
        window: number of earlier tokens that a token sees, or -1 for all of them.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    positions = torch.arange(len(k), device=q.device)
    ages = positions[len(k) - len(q) :, None] - positions
    sees = (ages >= 0) & ((ages <= window) | (window < 0))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * (scale or q.shape[-1] ** -0.5)
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def of_request(cache: Tensor, length: int, table: Tensor) -> Tensor:
    """Return the keys or values [length, key heads, dim] of one request.

    Args:
        cache: [blocks, block size, key heads, dim], the cache of all requests.
        length: number of tokens.
        table: [blocks of a request], the numbers of its blocks in the cache.
    """
    return cache[table[: -(-length // cache.shape[1])].long()].flatten(0, 1)[:length]


def window_of(causal: bool, window_size=(-1, -1), return_attn_probs=False, num_splits=0) -> int:
    """Return the number of earlier tokens that a token sees, and refuse what the functions below do not compute."""
    before, after = window_size
    assert causal and after in (-1, 0) and not return_attn_probs
    return before


def flash_attn_func(q, k, v, softmax_scale=None, **options) -> Tensor:
    """Attend in each sequence of a batch: q is [batch, t, heads, dim]."""
    window = window_of(**options)
    return torch.stack([attention(*sequence, softmax_scale, window) for sequence in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=None, softmax_scale=None, **options
) -> Tensor:
    """Attend in packed sequences, or in prompts with keys in a cache: q is [t, heads, dim]."""
    window = window_of(**options)
    out, queries, keys = torch.zeros_like(q), cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for n, (start, end) in enumerate(zip(queries[:-1], queries[1:], strict=True)):
        if end > start:
            first, last = keys[n : n + 2]
            if block_table is None:
                mine = k[first:last], v[first:last]
            else:
                mine = (of_request(x, last - first, block_table[n]) for x in (k, v))
            out[start:end] = attention(q[start:end], *mine, softmax_scale, window)
    return out


def flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens, block_table, softmax_scale=None, **options) -> Tensor:
    """Attend to the last tokens of each request: q is [requests, t, heads, dim]. Padding has no keys, and gives 0."""
    window = window_of(**options)
    out = torch.zeros_like(q)
    for n, length in enumerate(cache_seqlens.tolist()):
        if length:
            mine = (of_request(x, length, block_table[n]) for x in (k_cache, v_cache))
            out[n] = attention(q[n], *mine, softmax_scale, window)
    return out


def install() -> None:
    """Let this process import these functions as flash-attn 2. Neither Megatron nor fla must have been imported yet."""
    module = types.ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.__version__ = "2.8.0"
    for function in (flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(module, function.__name__, function)
    sys.modules["flash_attn"] = module
