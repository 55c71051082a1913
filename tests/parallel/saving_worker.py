"""One rank of runs that save, start anew, load and go on, in each of a list of layouts.

torchrun ... saving_worker.py OUT CASES
    CASES is JSON: {name: {"model": {...}, "layout": {...}, "weights": file in OUT, "sharding": ..., "save": ...,
    "load": ...}}. "sharding" is that of the distributed optimizer's state. "save" and "load" say whether Megatron
    divides the work among data parallel ranks.

Each rank compares what it loaded with what it had bit for bit, and so the steps after it.
"""

import json
import sys
from pathlib import Path

import harness
import parity
import torch
import worker

BEFORE, AFTER = range(2), range(2, 4)


def wanted(chunks, optimizer, sharding: str, is_loading: bool) -> dict:
    """Return what Megatron's training loop saves and loads of a model and its optimizer."""
    from megatron.core import parallel_state

    metadata = {
        "distrib_optim_sharding_type": sharding,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state = {f"model{n}": chunk.module.sharded_state_dict(metadata=metadata) for n, chunk in enumerate(chunks)}
    return state | {"optimizer": optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)}


def save(chunks, optimizer, case: dict, folder: Path):
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    strategy = get_default_save_sharded_strategy()
    if case["save"]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelSaveStrategyWrapper(strategy, group)
    state = wanted(chunks, optimizer, case["sharding"], is_loading=False)
    dist_checkpointing.save(state, str(folder), strategy)


def load(chunks, optimizer, case: dict, folder: Path):
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    strategy = get_default_load_sharded_strategy(str(folder))
    if case["load"]:
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        strategy = FullyParallelLoadStrategyWrapper(strategy, group)
    state = wanted(chunks, optimizer, case["sharding"], is_loading=True)
    loaded = dist_checkpointing.load(state, str(folder), strategy)
    for n, chunk in enumerate(chunks):
        chunk.module.load_state_dict(loaded[f"model{n}"])
    optimizer.load_state_dict(loaded["optimizer"])


def states(optimizer) -> list[dict[str, torch.Tensor]]:
    """For each parameter that this rank's optimizer steps: its own copy of it, and its moments."""
    return [
        {"param": p, **{name: x for name, x in part.optimizer.state[p].items() if name != "step"}}
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        for group in part.optimizer.param_groups
        for p in group["params"]
    ]


def tensors(chunks, optimizer) -> list[torch.Tensor]:
    """Everything that a checkpoint is to bring back."""
    return [p for chunk in chunks for p in chunk.parameters()] + [x for s in states(optimizer) for x in s.values()]


def train(chunks, optimizer, steps) -> list:
    losses = []
    for step in steps:
        losses.append(worker.backward(chunks, optimizer, step, None))
        optimizer.step()
    return losses


def check_replicas(chunks, optimizer):
    """The replicas of the lower bounds are equal, and no two tensors of a rank share memory."""
    first, *others = [chunk.module.decoder.hgrn2_bounds.weight for chunk in chunks]
    assert first.norm() > 0
    for other in others:
        assert torch.equal(first, other)
    # fp32 parameters are the optimizer's own without the distributed optimizer
    storages = [x.data_ptr() for s in states(optimizer) for x in s.values() if x.numel()]
    assert len(storages) == len(set(storages)), "two states of the optimizer share memory"


def run(case: dict, weights: dict, folder: Path):
    chunks, optimizer = parity.build(case["model"], case["layout"], weights)
    train(chunks, optimizer, BEFORE)
    folder.mkdir(exist_ok=True)
    torch.distributed.barrier()
    save(chunks, optimizer, case, folder)
    saved = [x.detach().clone() for x in tensors(chunks, optimizer)]
    losses = train(chunks, optimizer, AFTER)
    check_replicas(chunks, optimizer)
    went_on = tensors(chunks, optimizer)

    other = {name: torch.full_like(x, 0.1) for name, x in weights.items()}
    chunks, optimizer = parity.build(case["model"], case["layout"], other)
    load(chunks, optimizer, case, folder)
    check_equal(tensors(chunks, optimizer), saved)
    check_replicas(chunks, optimizer)
    assert train(chunks, optimizer, AFTER) == losses
    check_equal(tensors(chunks, optimizer), went_on)
    check_replicas(chunks, optimizer)


def check_equal(actual: list[torch.Tensor], expected: list[torch.Tensor]):
    assert [x.shape for x in actual] == [x.shape for x in expected]
    for n, (x, y) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(x, y, rtol=0, atol=0, msg=lambda m, n=n: f"tensor {n}: {m}")


def main(out: Path, cases: dict):
    harness.start_megatron(cpu_mode=True)
    for name, case in cases.items():
        print(name, flush=True)
        parity.start_layout(case["layout"], out / f"{name}.meeting")
        run(case, torch.load(out / case["weights"]), out / name)
        torch.distributed.barrier()
        (out / f"{name}.done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
