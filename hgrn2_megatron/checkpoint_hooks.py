"""Patches of how Megatron saves and loads checkpoints, one function each."""

import itertools

from hgrn2_megatron import checkpoint
from hgrn2_megatron.arguments import is_hgrn2_spec
from hgrn2_megatron.patching import wrap
from hgrn2_megatron.settings import megatron_release


def install_saving() -> None:
    """Wrap what divides a checkpoint's tensors among the ranks that could save or load them.

    Megatron divides by rank, so it makes every replica that one rank holds the main one, and then refuses to save a
    tensor with two. A rank with virtual pipeline stages holds a replica of the lower bounds for each. One is enough.
    """
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.strategies import fully_parallel
    from megatron.core.dist_checkpointing.utils import _sharded_tensor_shard_id

    def is_replica(shard) -> bool:
        # the last number of an id counts data parallel ranks, the others are 0 in the model's own copy
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
            # no distribution: a single rank, which keeps the ids as they were
            for shard in further if precomputed_distribution else []:
                shard.replica_id = 1

        return wrapped

    parameters = ["sharded_state_dict", "parallelization_group", "precomputed_distribution"]
    wrap(fully_parallel, "distribute_main_replicas_with_precomputed_distribution", parameters, make)


def install_optimizer() -> None:
    """Wrap what the distributed optimizer saves with --dist-ckpt-optim-fully-reshardable, before megatron-core 0.20.

    It cuts parameters out of buffers without padding at places that count the padding between buckets, and so saves and
    loads parts of the wrong parameters. The lower bounds have a bucket of their own, which makes padding more likely.
    Megatron mended it in pull request 5077.
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
    """Where each parameter lies in a gradient buffer whose buckets follow each other without padding."""
    paddings = [bucket.grad_data.numel() - bucket.numel_unpadded for bucket in buffer.buckets]
    before = [0, *itertools.accumulate(paddings)]
    return {
        param: (start - before[bucket], end - before[bucket], bucket)
        for param, (start, end, bucket) in buffer.param_index_map.items()
    }


def install_checkpoint() -> None:
    """Wrap the two readers of megatron.training.checkpointing: refuse or adapt checkpoints of other models.

    Megatron reads a checkpoint twice, first what it says of itself and then its weights. In between it has no hook,
    and what it then finds missing, or finds of the right shape, it takes.
    """
    import megatron.training.checkpointing as checkpointing

    # --use-checkpoint-args reads a checkpoint whose args need not be those of the command line
    restoring = []

    def make_restore(load_args_from_checkpoint):
        def wrapped(args, *rest, **kwargs):
            asked = is_hgrn2_spec(args.spec)
            restoring.append(True)
            try:
                result = load_args_from_checkpoint(args, *rest, **kwargs)
            finally:
                restoring.pop()
            if isinstance(result, tuple) and (asked or is_hgrn2_spec(args.spec)):
                checkpoint.restore(args, result[1])
            return result

        return wrapped

    def make_base_load(load_base_checkpoint):
        # of the last reading of what a checkpoint says of itself: its args, its folder
        distributed = []

        def wrapped(load_dir, args, rank0=False, sharded_state_dict=None, *rest, **kwargs):
            load_args = args
            if sharded_state_dict and distributed and is_hgrn2_spec(args.spec):
                load_args = checkpoint.adapt(args, sharded_state_dict, *distributed[0])
            result = load_base_checkpoint(load_dir, load_args, rank0, sharded_state_dict, *rest, **kwargs)
            state_dict, folder, _, kind = result
            saved = (state_dict or {}).get("args")
            is_distributed = kind is not None and kind.name == "GLOBAL"
            if saved and not restoring:
                checkpoint.check(args, saved, is_distributed)
            if rank0:
                distributed[:] = [(saved, folder)] if saved and is_distributed else []
            return result

        return wrapped

    wrap(checkpointing, "load_args_from_checkpoint", ["args"], make_restore)
    wrap(checkpointing, "_load_base_checkpoint", ["load_dir", "args", "rank0", "sharded_state_dict"], make_base_load)
