"""Build a model in any layout from the weights of one process, and collect its tensors as one process has them.

A model is a dict of arguments of `harness.build_model`. It may also have `steps`, a number of steps, and `muon`, fields
of Megatron's OptimizerConfig for the optimizer Muon, which then takes the place of Adam. A layout is a dict with the
sizes `tp`, `pp`, `vpp`, `cp` and `ep`, with `sequence_parallel`, `distributed_optimizer`, `overlap` and `fsdp`, a
sharding strategy of Megatron-FSDP, and with `config`, the settings that only this layout has. Every tensor has the name
that it has in one process.
"""

import re
from pathlib import Path

import harness
import torch
from torch import Tensor

# The second step meets what the first one has changed or left behind. The third meets what a later step leaves behind.
# The learning rate is large enough that a value which misses the updates of earlier steps changes the weights by more
# than the tolerance. At 1e-2, differences in rounding would exceed it too.
STEPS = 3
LR, WEIGHT_DECAY, ADAM_EPS, LARGEST_NORM = 3e-3, 0.1, 1e-5, 0.5
# parts of layouts, and of their `config`
DISTRIBUTED = {"distributed_optimizer": True, "overlap": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
# A micro-batch has 80 or 160 tokens on a rank, so this makes several whole chunks and a shorter last one.
CHUNKED = {"hgrn2_loss_chunk_size": 37}


def of_model(model: dict) -> dict:
    """Return the arguments of `harness.build_model` among those of a model."""
    return {name: value for name, value in model.items() if name not in ("muon", "steps")}


def group_sizes(layout: dict) -> tuple:
    """Return what the process groups of a layout depend on."""
    hybrid = layout.get("config", {}).get("hybrid_context_parallel", False)
    return (*(layout.get(name) or 1 for name in ("tp", "pp", "vpp", "cp", "ep")), hybrid)


def start_layout(layout: dict, meeting: Path):
    """Replace Megatron's process groups by those of a layout.

    Args:
        layout: see the top of this file.
        meeting: path of a new file in which the ranks find each other.
    """
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    # process groups have threads, which would pile up from layout to layout
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.distributed.destroy_process_group()
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.get("tp", 1),
        pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vpp"),
        context_parallel_size=layout.get("cp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        hybrid_context_parallel=layout.get("config", {}).get("hybrid_context_parallel", False),
    )
    seed()


def seed() -> None:
    """Seed Megatron's generators for the current process groups."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(0, inference_rng_tracker=True, force_reset_rng=True)


def build(model: dict, layout: dict, weights: dict[str, Tensor]):
    """Return this rank's model chunks, wrapped for data parallelism, and their optimizer.

    Args:
        model, layout: see the top of this file.
        weights: the weights of one process, from which the chunks take theirs.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    muon = model.get("muon")
    distributed, overlap, fsdp = (bool(layout.get(name)) for name in ("distributed_optimizer", "overlap", "fsdp"))
    gather = distributed and overlap
    settings = dict(
        tp=layout.get("tp", 1),
        sequence_parallel=layout.get("sequence_parallel", False),
        pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vpp"),
        context_parallel_size=layout.get("cp", 1),
        expert_model_parallel_size=layout.get("ep", 1),
        pipeline_dtype=torch.float32,
        deallocate_pipeline_outputs=True,
        batch_p2p_sync=False,
        # With two stages, the next stage is also the previous one, and batched sends would confuse the two directions.
        overlap_p2p_comm="vpp" in layout,
        batch_p2p_comm="vpp" not in layout,
        finalize_model_grads_func=finalize_model_grads,
    )
    chunks = []
    for vp_stage in range(layout["vpp"]) if "vpp" in layout else [None]:
        ends = dict(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        chunk = harness.build_model(
            pre_process=parallel_state.is_pipeline_first_stage(**ends),
            post_process=parallel_state.is_pipeline_last_stage(**ends),
            vp_stage=vp_stage,
            **of_model(model) | settings | layout.get("config", {}),
        )
        with torch.no_grad():
            for name, p in chunk.named_parameters():
                p.copy_(_shard(chunk, name, p, weights))
        chunks.append(chunk)
    config = chunks[0].config
    options = dict(
        delay_wgrad_compute=config.delay_wgrad_compute,
        overlap_grad_reduce=overlap,
        overlap_param_gather=gather,
        bucket_size=2000,
    )
    if fsdp:
        # the division in the reduction needs NCCL
        options |= dict(
            use_megatron_fsdp=True, data_parallel_sharding_strategy=layout["fsdp"], gradient_reduce_div_fusion=False
        )
    ddp_config = DistributedDataParallelConfig(use_distributed_optimizer=distributed, **options)
    wrapper = FullyShardedDataParallel if fsdp else DistributedDataParallel
    chunks = [wrapper(config, ddp_config, chunk, disable_bucketing=n > 0) for n, chunk in enumerate(chunks)]
    if overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(chunks) > 1 else no_sync[0]
    # The epsilon is larger than the rounding errors that another order of sums leaves in a gradient of zero.
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="muon" if muon else "adam", lr=LR, weight_decay=WEIGHT_DECAY, clip_grad=LARGEST_NORM,
            adam_eps=ADAM_EPS, use_distributed_optimizer=distributed, overlap_param_gather=gather, **muon or {},
        ),
        chunks,
    )  # fmt: skip
    return chunks, optimizer


def gradients(chunks, optimizer) -> dict[str, Tensor]:
    """Return the full gradients of this rank's chunks."""
    from megatron.core import parallel_state

    groups = {
        True: parallel_state.get_data_parallel_group(with_context_parallel=True),
        False: parallel_state.get_expert_data_parallel_group(),
    }
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])

    def whole(name, p):
        if chunks[0].ddp_config.use_megatron_fsdp:
            return _over_dp(chunks[0].module.param_and_grad_buffer.dist_main_grad[name], p)
        if not chunks[0].ddp_config.use_distributed_optimizer:
            return p.main_grad
        # each rank has only the reduced gradients of the part that it updates
        full = torch.zeros_like(p.main_grad).view(-1)
        for part in optimizers:
            if p in part.model_param_gbuf_map:
                own = part._get_model_param_range_map(p)["param"]
                full[own.start : own.end] = p.main_grad.view(-1)[own.start : own.end]
        # Megatron marks the weights of experts with allreduce=False
        torch.distributed.all_reduce(full, group=groups[getattr(p, "allreduce", True)])
        return full.view(p.shape)

    return _collect(chunks, whole)


def weights_of(chunks) -> dict[str, Tensor]:
    """Return the full weights of this rank's chunks."""
    if chunks[0].ddp_config.use_megatron_fsdp:
        buffer = chunks[0].module.param_and_grad_buffer
        return _collect(chunks, lambda name, p: _over_dp(buffer.dist_main_weight[name].detach(), p))
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
    return _collect(chunks, lambda name, p: p.detach())


def _over_dp(x, p) -> Tensor:
    """Return what this tensor-parallel rank holds of a DTensor of Megatron-FSDP that belongs to the parameter `p`.

    The function of Megatron that gathers a DTensor does not work over gloo, which needs slices of equal size.
    """
    if not x.placements[0].is_shard():
        return x.to_local()
    group = x.device_mesh.get_group(0)
    parts = [None] * group.size()
    torch.distributed.all_gather_object(parts, x.to_local().reshape(-1), group=group)
    return torch.cat(parts).view(getattr(p, "orig_param", p).shape)


def _collect(chunks, of) -> dict[str, Tensor]:
    from megatron.core import parallel_state

    tp_group = parallel_state.get_tensor_model_parallel_group()
    result = {}
    for chunk in chunks:
        model = chunk.module.module if chunk.ddp_config.use_megatron_fsdp else chunk.module
        for name, p in model.named_parameters():
            mine = of(name, p).contiguous()
            parts = [torch.empty_like(mine) for _ in range(tp_group.size())]
            torch.distributed.all_gather(parts, mine, group=tp_group)
            full = harness.unshard(name, p, parts, model.decoder.hgrn2_bounds.num_layers)
            name = _name(model, name)
            if name in result:
                # the chunks of one stage hold replicas of the same parameter
                torch.testing.assert_close(full, result[name], rtol=0, atol=0)
            result[name] = full.clone()
    return result


def _name(chunk, name: str) -> str:
    """Return the name that a chunk's parameter has in one process."""
    from megatron.core import parallel_state

    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    if ".local_experts." in name:
        before, expert, after = re.split(r"(?<=local_experts)\.(\d+)\.", name)
        own = chunk.config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
        expert = int(expert) + own * parallel_state.get_expert_model_parallel_rank()
        name = f"{before}.{expert}.{after}"
    if name.startswith("decoder.layers."):
        _, _, local, rest = name.split(".", 3)
        return f"decoder.layers.{chunk.decoder.layers[int(local)].layer_number - 1}.{rest}"
    return name


def _shard(chunk, name: str, p, weights: dict[str, Tensor]) -> Tensor:
    from megatron.core import parallel_state

    tp_group = parallel_state.get_tensor_model_parallel_group()
    full = weights[_name(chunk, name)]
    rows = chunk.decoder.hgrn2_bounds.num_layers
    return harness.shard(name, p, full, tp_group.rank(), tp_group.size(), rows)


def orthogonalized(gradient: Tensor, blocks: int, dim: int) -> Tensor:
    """Return Muon's step for a matrix, or for equal blocks of it along `dim`, each by itself. Its length is 1."""
    from emerging_optimizers.orthogonalized_optimizers.muon_utils import newton_schulz

    def step(x):
        return max(x.shape) ** 0.5 * newton_schulz(x.contiguous(), steps=5)

    return torch.cat([step(x) for x in gradient.chunk(blocks, dim)], dim)


def put_together(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Merge the tensors of all ranks into those of one process. A tensor of several ranks must be equal on all."""
    result = {}
    for rank in ranks:
        for name, x in rank.items():
            if name in result:
                torch.testing.assert_close(
                    x, result[name], rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
                )
            result[name] = x
    return result
