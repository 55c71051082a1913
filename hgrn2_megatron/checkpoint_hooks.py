"""Patches of Megatron's functions that save and load checkpoints. Each patch is one function."""

import copy
import itertools

from megatron.core.dist_checkpointing.serialization import load_content_metadata

from hgrn2_megatron import checkpoint, checkpoint_check, restored_args
from hgrn2_megatron.arguments import is_hgrn2_spec
from hgrn2_megatron.config import UsageError
from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import megatron_release


def install_saving() -> None:
    """Wrap the function that divides a checkpoint's tensors among the ranks that could save or load them.

    Megatron chooses a rank to save a tensor, and makes every replica of the tensor on this rank a main one. It then
    refuses to save a tensor that has two main replicas. The lower bounds can have two, because a rank holds a replica
    for each of its virtual pipeline stages. The wrapper keeps one main replica per rank.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id

    def is_replica(shard) -> bool:
        # The last number of an id counts data-parallel ranks. The other numbers are 0 for the main replica.
        return isinstance(shard.replica_id, tuple) and any(shard.replica_id[:-1])

    def make(distribute):
        def wrapped(sharded_state_dict, parallelization_group, precomputed_distribution):
            shards = [x for x in nested_values(sharded_state_dict) if isinstance(x, ShardedTensor)]
            held, further = set(), []
            for shard in sorted(shards, key=is_replica):
                name = _sharded_tensor_shard_id(shard)
                if name in held and is_replica(shard):
                    further.append(shard)
                held.add(name)
            distribute(sharded_state_dict, parallelization_group, precomputed_distribution)
            # Without a distribution there is a single rank, which keeps the ids.
            for shard in further if precomputed_distribution else []:
                shard.replica_id = 1

        return wrapped

    parameters = ["sharded_state_dict", "parallelization_group", "precomputed_distribution"]
    wrap(fully_parallel, "distribute_main_replicas_with_precomputed_distribution", parameters, make)


def install_optimizer() -> None:
    """Fix the states that the distributed optimizer saves with --dist-ckpt-optim-fully-reshardable before 0.20.

    The optimizer cuts parameters out of buffers without padding, but its offsets count the padding between buckets. So
    it saves and loads parts of the wrong parameters. The lower bounds have a bucket of their own, which makes padding
    more likely. Megatron's pull request 5077 fixed this.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if megatron_release() >= (0, 20):
        return

    def make(sharded_param_state):
        def wrapped(self, *args, **kwargs):
            padded = [buffer.param_index_map for buffer in self.buffers]
            for buffer in self.buffers:
                buffer.param_index_map = _without_padding(buffer)
            try:
                return sharded_param_state(self, *args, **kwargs)
            finally:
                for buffer, index_map in zip(self.buffers, padded, strict=True):
                    buffer.param_index_map = index_map

        return wrapped

    wrap(DistributedOptimizer, "sharded_param_state_fully_reshardable", ["self", "model_sharded_state_dict"], make)


def _without_padding(buffer) -> dict:
    """Return each parameter's place in a gradient buffer whose buckets have no padding between them."""
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *itertools.accumulate(paddings)]
    return {
        param: (start - before[bucket], end - before[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def _knows_layers(args) -> bool:
    return bool(args.num_layers or getattr(args, "hybrid_layer_pattern", None))


def install_checkpoint() -> None:
    """Wrap the two functions that read checkpoints, to refuse or adapt checkpoints of other models.

    Megatron reads a checkpoint twice: first its args, then its weights. It has no hook between the two. By itself it
    loads every weight that has the right shape, even if the weight means something else in this model.

    Megatron 0.19 and later can read a GPT's checkpoint into a HybridModel, but knows no HGRN2 layers. This is off for
    HGRN2 models.
    """
    import megatron.training.checkpointing as checkpointing
    from megatron.training.utils import print_rank_0

    # The list is not empty while --use-checkpoint-args reads the checkpoint's args, which may differ from the run's.
    restoring = []

    def make_restore(load_args_from_checkpoint):
        def wrapped(args, *rest, **kwargs):
            before = copy.copy(args)
            restoring.append(True)
            try:
                result = load_args_from_checkpoint(args, *rest, **kwargs)
            finally:
                restoring.pop()
            # Megatron reads --load last, after --pretrained-checkpoint
            of_load = not rest and not kwargs
            if of_load and not isinstance(result, tuple) and not _knows_layers(args):
                raise UsageError(
                    f"--load {args.load} has no checkpoint from which --use-checkpoint-args could take the model: "
                    "correct the folder, or give the model's flags"
                )
            if isinstance(result, tuple) and (is_hgrn2_spec(before.spec) or is_hgrn2_spec(args.spec)):
                restored_args.restore(args, before, result[1])
            return result

        return wrapped

    def make_base_load(load_base_checkpoint):
        # args and folder of the distributed checkpoint whose args were read last
        distributed = []

        def wrapped(load_dir, args, rank0=False, sharded_state_dict=None, *rest, **kwargs):
            load_args = args
            if sharded_state_dict and distributed and is_hgrn2_spec(args.spec):
                load_args = checkpoint.adapt(args, sharded_state_dict, *distributed[0])
            result = load_base_checkpoint(load_dir, load_args, rank0, sharded_state_dict, *rest, **kwargs)
            state_dict, folder, release, kind = result
            saved = (state_dict or {}).get("args")
            is_distributed = kind is not None and kind.name == "GLOBAL"
            if kind is not None and is_hgrn2_spec(args.spec) and not restoring:
                checkpoint_check.check_format(args, kind.name)
            if saved and not restoring:
                metadata = load_content_metadata(preloaded_state_dict=state_dict) or {}
                sharding = metadata.get("distrib_optim_sharding_type")
                checkpoint_check.check(args, saved, is_distributed, sharding, release)
                # this function is called once for the args and once for the weights
                if (
                    is_hgrn2_spec(args.spec)
                    and not rank0
                    and (warning := checkpoint_check.other_vocabulary(args, saved))
                ):
                    print_rank_0(f"HGRN2 warning: {warning}")
            if rank0:
                distributed[:] = [(saved, folder)] if saved and is_distributed else []
            elif saved and is_hgrn2_spec(args.spec):
                # Megatron compares the depth, which both forms of a model count differently. It is checked above.
                saved.num_layers = args.num_layers
            return result

        return wrapped

    def make_setup(maybe_setup_gpt_to_hybrid_load):
        def wrapped(args, ckpt_args, model):
            return (None, False) if is_hgrn2_spec(args.spec) else maybe_setup_gpt_to_hybrid_load(args, ckpt_args, model)

        return wrapped

    wrap(checkpointing, "load_args_from_checkpoint", ["args"], make_restore)
    wrap(checkpointing, "_load_base_checkpoint", ["load_dir", "args", "rank0", "sharded_state_dict"], make_base_load)
    if hasattr(checkpointing, "_maybe_setup_gpt_to_hybrid_load"):
        wrap(checkpointing, "_maybe_setup_gpt_to_hybrid_load", ["args", "ckpt_args", "model"], make_setup)
