"""Megatron-FSDP: what is refused beside it, and a patch of the optimizer states that it saves."""

import torch

from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import Settings


def _has_one_copy_of_each_expert(s: Settings) -> bool:
    """Return whether no two ranks hold the same expert, as far as the settings tell."""
    experts, size = s.expert_model_parallel_size or 1, s.world_size
    if experts == 1 or size is None:
        return False
    tensor = s.expert_tensor_parallel_size or s.tensor_model_parallel_size or 1
    return size <= experts * tensor


# Features that cannot be used with --use-megatron-fsdp. The rows have the same parts as those of UNSUPPORTED in
# requirements.py.
NOT_WITH_FSDP = (
    (
        # The device mesh of Megatron-FSDP has no place for pipeline stages.
        lambda s: (s.pipeline_model_parallel_size or 1) > 1,
        "--pipeline-model-parallel-size above 1",
        "give 1, because Megatron-FSDP counts every rank as data-, tensor- or expert-parallel",
    ),
    (
        # Megatron looks for the weights of the channel mixers inside a Float16Module.
        lambda s: (s.save or s.load) and not (s.bf16 or s.fp16),
        "--save or --load in fp32",
        "give --bf16, because Megatron cannot save an fp32 model in the format fsdp_dtensor",
    ),
    (
        # To save a weight of SwiGLU, Megatron splits it in two and reads an attribute that only sharded weights have.
        lambda s: (s.save or s.load) and s.data_parallel_sharding_strategy == "no_shard",
        "--save or --load under --data-parallel-sharding-strategy no_shard",
        "give another strategy, such as optim, because Megatron fails when it saves unsharded weights of SwiGLU",
    ),
    (
        # The uninitialized weights of a local layer would become NaN.
        lambda s: s.init_model_with_meta_device and s.use_cpu_initialization,
        "--init-model-with-meta-device beside --use-cpu-initialization",
        "drop one of the two flags",
    ),
    (
        lambda s: s.enable_cuda_graph or s.cuda_graph_impl not in (None, "none"),
        "--cuda-graph-impl",
        "drop one of the two flags, because graphs of HGRN2 layers were never captured with sharded weights",
    ),
    (
        # Megatron-FSDP would divide the sum of the gradients by the number of ranks again for each micro-batch.
        _has_one_copy_of_each_expert,
        "--expert-model-parallel-size that leaves one copy of each expert",
        "give a smaller one, because the experts would get wrong gradients from several micro-batches",
    ),
    (
        # The loss by chunks adds to a buffer of gradients that Megatron-FSDP allocates only later.
        lambda s: s.hgrn2_loss_chunk_size and s.gradient_accumulation_fusion,
        "--hgrn2-loss-chunk-size and fused accumulation of gradients",
        "give --no-gradient-accumulation-fusion",
    ),
    (
        # Megatron looks for the weights in a wrapper that a model without an optimizer does not have. This row comes
        # first, because Megatron sets --no-load-optim beside --skip-train.
        lambda s: s.load and s.skip_train,
        "--load and --skip-train",
        "drop --skip-train, and give the checkpoint's iteration as --train-iters, with which a run only evaluates",
    ),
    (
        # Megatron would copy the weights of the model to the optimizer, and Megatron-FSDP does not implement it.
        lambda s: s.pretrained_checkpoint or (s.load and (s.finetune or s.no_load_optim)),
        "--pretrained-checkpoint, or --load with --finetune or --no-load-optim",
        "drop the flag, because Megatron-FSDP loads a model only together with its optimizer",
    ),
    (
        lambda s: s.megatron_fsdp_version == 2,
        "--megatron-fsdp-version 2",
        "give 1, because the second version was never run with HGRN2 layers",
    ),
)


def install_optimizer() -> None:
    """Wrap the function that gives the states of the optimizer to a checkpoint of Megatron-FSDP.

    A rank may hold nothing of a small parameter. PyTorch's Adam has no state for such a parameter, but all ranks must
    give a checkpoint the same names, or saving waits forever. The wrapper adds an empty state.

    Raises:
        RuntimeError: the installed Megatron is an unknown release.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    def make(sharded_param_state):
        def wrapped(self, is_loading=False):
            if is_loading:
                self._init_optimizer_states_with_dummy_values()
            if isinstance(self.optimizer, torch.optim.Adam):
                _add_empty_states(self.optimizer)
            return sharded_param_state(self)

        return wrapped

    wrap(DistributedOptimizer, "sharded_param_state_fsdp_dtensor", ["self", "is_loading"], make)


def _add_empty_states(adam: torch.optim.Adam) -> None:
    steps = [state["step"] for state in adam.state.values()]
    for group in adam.param_groups:
        for p in group["params"]:
            if steps and p not in adam.state:
                moments = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[p] = {"step": steps[0].clone(), **moments}
