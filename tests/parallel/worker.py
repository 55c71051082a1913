"""One rank of parity runs: several steps of Megatron's own schedule and optimizer in each of a list of layouts.

torchrun ... worker.py OUT CASES      CASES is JSON: {name: {"model": {...}, "layout": {...}, "weights": file in OUT}}

The ranks of a tensor-parallel group put what they hold together as one process would hold it, and one of them saves it.
"""

import json
import sys
from pathlib import Path

import harness
import parity
import torch


def data(step: int, dp_rank: int, dp_size: int):
    """This rank's micro-batches of one sequence of a step: (tokens, labels, mask of the losses that count)."""
    tokens, labels = harness.batch(seed=step, size=parity.GLOBAL_BATCH)
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.7).float()
    for rows in zip(*(x.split(1) for x in (tokens, labels, mask)), strict=True):
        if dp_rank == 0:
            yield _own_tokens(*rows)
        dp_rank = (dp_rank - 1) % dp_size


def _own_tokens(tokens, labels, mask):
    """The context parallel rank's, as Megatron deals them out."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": tokens, "labels": labels, "loss_mask": mask, "cu_seqlens": None}
    own = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=parallel_state.get_context_parallel_group())
    return own["tokens"], own["labels"], own["loss_mask"]


def forward_step(data_iterator, model):
    tokens, labels, mask = next(data_iterator)

    def loss_func(losses):
        if model.config.calculate_per_token_loss:
            total, count = (losses * mask).sum(), mask.sum()
            return total, count.int(), {"loss": torch.stack((total, count)).detach()}
        # Megatron sums over context parallel ranks what it averages over the others
        loss = losses.mean() / model.config.context_parallel_size
        return loss, {"loss": torch.stack((losses.mean(), torch.ones(()))).detach()}

    return model(tokens, None, None, labels=labels), loss_func


def run(model: dict, layout: dict, weights: dict) -> dict:
    """What this rank sees: losses and gradient norms of every step, gradients of the first, weights at the end."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    chunks, optimizer = parity.build(model, layout, weights)
    dp_group = parallel_state.get_data_parallel_group()
    losses, norms = [], []
    for step in range(parity.STEPS):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        iterators = [data(step, dp_group.rank(), dp_group.size()) for _ in chunks]
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=parity.GLOBAL_BATCH // dp_group.size(),
            seq_length=harness.SEQ,
            micro_batch_size=1,
        )
        if step == 0:
            result = {f"gradient {name}": x for name, x in parity.gradients(chunks, optimizer).items()}
        _, norm, _ = optimizer.step()
        norms.append(norm)
        if reports:
            total = sum(report["loss"] for report in reports)
            torch.distributed.all_reduce(
                total, group=parallel_state.get_data_parallel_group(with_context_parallel=True)
            )
            losses.append(total[0] / total[1])
    result |= {f"weight {name}": x for name, x in parity.weights_of(chunks).items()}
    result["gradient norms"] = torch.tensor(norms)
    if losses:
        result["losses"] = torch.stack(losses)
    return result


def main(out: Path, cases: dict):
    harness.start_megatron(cpu_mode=True)
    for name, case in cases.items():
        print(name, flush=True)
        parity.start_layout(case["layout"])
        from megatron.core import parallel_state

        result = run(case["model"], case["layout"], torch.load(out / case["weights"]))
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(result, out / f"{name}.{torch.distributed.get_rank()}")
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
