"""The mixer's norm, whose output is computed again in the backward instead of being kept."""

from functools import partial

import torch
from torch import Tensor

from hgrn2_megatron.norm import HiddenShardedRMSNorm


class RecomputedNorm(HiddenShardedRMSNorm):
    """The mixer's norm. Its output carries a function that computes it again, for `recompute_in_backward`."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if y.requires_grad:
            # The tensor carries it and not this module, because a hook may replace the norm's input or output.
            vars(y)[_RECOMPUTE] = y._version, partial(super().forward, x.detach())
        return y


_RECOMPUTE = "hgrn2_recompute"


def recompute_in_backward(x: Tensor, user: Tensor) -> None:
    """Let autograd recompute x for the backward of `user` instead of keeping it until then.

    This function frees nothing itself. The memory of x becomes free once nothing holds it any more. A hook, a view or
    an alias that still holds x finds it unchanged.

    A tensor is recomputed if an autograd function saved it with `save_for_backward`, as all linear layers of Megatron
    and Transformer Engine do. A saved tensor that already has hooks of other code, which may move it elsewhere, is left
    alone. Saved-tensor hooks around out_proj would be simpler. But then its backward would get a plain tensor for the
    weight, without the attributes that Megatron sets on the parameter.

    Args:
        x: output of `RecomputedNorm`. If a forward hook has replaced that output by another tensor, nothing is
            recomputed.
        user: tensor that was computed from x, and that nothing has used yet.
    """
    version, recompute = vars(x).pop(_RECOMPUTE, (None, None))
    if version is None or x.grad_fn is None or x._version != version:
        return
    memory = x.untyped_storage().data_ptr()

    def recompute_view(packed: tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        with torch.no_grad():
            return recompute().as_strided(*packed)

    for saved in _saved_tensors_between(x.grad_fn, user.grad_fn):
        # a tensor that has hooks of other code
        if saved.unpack_hook is not None:
            continue
        data = saved.data
        if type(data) is Tensor and data.dtype == x.dtype and data.untyped_storage().data_ptr() == memory:
            saved.register_hooks(lambda y: (y.size(), y.stride(), y.storage_offset()), recompute_view)


def _saved_tensors_between(begin, end) -> list:
    """Return the tensors that autograd functions between the nodes `begin` and `end` have saved for their backward."""
    nodes, todo = set(), [end]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes and node._sequence_nr() > begin._sequence_nr():
            nodes.add(node)
            todo += [before for before, _ in node.next_functions]
    return [saved for node in nodes for saved in getattr(node, "_raw_saved_tensors", ())]
