"""Megatron's fine-grained activation offloading: the parts of the mixer that take part in it, and what is refused."""

import torch
from megatron.core.pipeline_parallel.fine_grained_activation_offload import ChunkOffloadHandler
from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
    FineGrainedActivationOffloadingInterface as Interface,
)
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from hgrn2_megatron.config import UsageError
from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import megatron_release

# names of --offload-modules that are parts of the mixer. Attention layers have parts of the same names.
MIXER_PARTS = IN_PROJ, OPERATOR, OUT_PROJ = "qkv_linear", "core_attn", "attn_proj"
EXPERT_PARTS = "expert_fc1", "moe_act", "fused_group_mlp"


class OffloadGroup(Interface):
    """A part of a layer whose saved tensors Megatron moves to the host until their backward.

        group = OffloadGroup(offload, x, name)
        with group as x:
            y = function(x)
        y = group.commit(y)

    Autograd's saved tensors of `function` are the ones that move. They start to move at `commit`, which may come later.

    Args:
        offload: whether anything moves. If not, the group passes its tensors through.
        x: input of the part, with a gradient.
        name: name of the part in `--offload-modules`.
    """

    def commit(self, y: Tensor, release: Tensor | None = None) -> Tensor:
        """Begin to move the saved tensors to the host.

        Args:
            y: output of the part, or of what was computed from it.
            release: a saved tensor that something holds, although nothing will read it. Its memory is freed by force.

        Returns:
            y. Its gradient waits until the saved tensors are back.
        """
        if not self.offload:
            return y
        released = [] if release is None else [release]
        if hasattr(self, "group_offload"):
            return self.group_offload(y, forced_released_tensors=released)
        return self.group_commit(y, name=self.name, forced_released_tensors=released)  # megatron-core 0.18


def install_reload() -> None:
    """Wrap the function that gives the backward an offloaded tensor, so that its copy to the host is complete.

    In the first iteration Megatron offloads the last parts of a model too. It then copies them back as soon as the
    backward asks for them, on the stream of the computation, which does not wait for the stream of the first copy.
    Where many parts move, the first copy is still under way, and the gradients of that iteration are wrong.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """

    def make(tensor_pop):
        def wrapped(self, tensor_tag):
            if isinstance(tensor_tag, tuple):
                group = self.offload_groups[tensor_tag[0] - 1]
                is_on_host = isinstance(group._tensors[tensor_tag], tuple)
                if is_on_host:
                    group.wait_offload_event(torch.cuda.current_stream())
            return tensor_pop(self, tensor_tag)

        return wrapped

    wrap(ChunkOffloadHandler, "tensor_pop", ["self", "tensor_tag"], make)


# Rows as in requirements.py: a function that returns whether the settings ask for a feature, its flag, and what to do.
UNSUPPORTED = (
    (
        lambda s: s.fine_grained_activation_offloading and "gdp_qkv" in (s.offload_modules or ()),
        "--offload-modules gdp_qkv",
        "drop the name, because it is a part of gated delta products, and the model has none",
    ),
    (
        lambda s: s.fine_grained_activation_offloading and s.recompute_granularity == "full",
        "--fine-grained-activation-offloading with --recompute-granularity full",
        "give --recompute-granularity selective, or drop one of the two flags, because Megatron would count each "
        "offloaded part once more when it recomputes the layer",
    ),
)


def check_layers(stack) -> None:
    """Refuse the layers of a model chunk if Megatron would take them for finished after the first offloaded part.

    Megatron keeps the last part of each name on the GPU. From megatron-core 0.19 on, it takes a chunk for finished when
    nothing of it has been offloaded, and stops in the second step with "Chunk mismatch".

    Args:
        stack: module with a `config` whose `layers` are built.

    Raises:
        UsageError: the chunk's first offloaded part has no second of the same name, and other parts follow.
    """
    if not stack.config.fine_grained_activation_offloading or megatron_release() < (0, 19):
        return
    names = [name for layer in stack.layers for name in _parts(layer, stack.config.offload_modules)]
    if len(names) > 1 and names.count(names[0]) == 1:
        raise UsageError(
            f"--offload-modules {' '.join(stack.config.offload_modules)} offloads {names[0]} first in a pipeline stage "
            f"or virtual stage, but only one of its {len(stack.layers)} layers has this part, and Megatron needs two: "
            "give the stage more layers, name fewer modules, or drop --fine-grained-activation-offloading"
        )


def _parts(layer, modules: list[str]) -> list[str]:
    """Return the offloaded parts of one layer, in the order of its forward."""
    mixes = not isinstance(layer.self_attention, IdentityOp)
    names = ["attn_norm"] * layer.offload_attn_norm
    names += [name for name in MIXER_PARTS if mixes and name in modules]
    names += ["mlp_norm"] * layer.offload_mlp_norm
    return names + [name for name in EXPERT_PARTS if layer.is_moe_layer and name in modules]
