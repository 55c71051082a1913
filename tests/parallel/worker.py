"""One rank of a parity run: a training step's loss and gradients, saved by rank 0 as one process would hold them.

torchrun ... worker.py OUT {"tp": 2, "sequence_parallel": true, ...}
"""

import json
import sys

import harness
import torch
from torch import Tensor

NUM_LAYERS = 3


def step(model, dp_rank: int, dp_size: int) -> Tensor:
    """One pass of Megatron's own schedule over this rank's part of the batch; its mean loss."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tokens, labels = (x.chunk(dp_size)[dp_rank] for x in harness.batch())

    def loss_func(losses):
        loss = losses.mean()
        return loss, {"loss": loss.detach()}

    def forward_step(data_iterator, model):
        return model(tokens, None, None, labels=labels), loss_func

    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=None,
        model=[model],
        num_microbatches=1,
        seq_length=harness.SEQ,
        micro_batch_size=len(tokens),
    )
    return reports[0]["loss"]


def main(out: str, layout: dict):
    harness.start_megatron(layout.get("tp", 1), cpu_mode=True)
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    model = harness.build_model(
        num_layers=NUM_LAYERS,
        deallocate_pipeline_outputs=True,
        finalize_model_grads_func=finalize_model_grads,
        **layout,
    )
    tp_group = parallel_state.get_tensor_model_parallel_group()
    dp_group = parallel_state.get_data_parallel_group()
    full = torch.load(f"{out}.weights")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(harness.shard(name, p, full[name], tp_group.rank(), tp_group.size(), NUM_LAYERS))

    ddp = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    loss = step(ddp, dp_group.rank(), dp_group.size())
    torch.distributed.all_reduce(loss, group=dp_group)
    result = {"loss": loss / dp_group.size()}
    for name, p in model.named_parameters():
        parts = [torch.empty_like(p.main_grad) for _ in range(tp_group.size())]
        torch.distributed.all_gather(parts, p.main_grad, group=tp_group)
        result[name] = harness.unshard(name, p, parts, NUM_LAYERS)
    if torch.distributed.get_rank() == 0:
        torch.save(result, out)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
