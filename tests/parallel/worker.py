"""One rank of parity runs: several steps of Megatron's own schedule and optimizer in each of a list of layouts.

torchrun ... worker.py OUT CASES
    CASES is JSON: {name: {"model": {...}, "layout": {...}, "weights": file in OUT}}

The ranks of a tensor-parallel group put what they hold together as one process would hold it, and one of them saves it.
"""

import itertools
import json
import os
import sys
import time
from pathlib import Path

import delayed_linear
import harness
import offload_on_cpu
import parity
import torch

# by a model's hgrn2_packed_layout: borders of packed sequences in a row of harness.SEQ tokens with their padding, and
# how many tokens of each are real
PACKINGS = {
    # one of a single real token; 8 and 16 tokens are chunks of 2 and 4 at cp 4
    "documents": ([0, 8, 24, 32, 40], [1, 16, 7, 8]),
    # chunks of 10 tokens at cp 2 and of 5 at cp 4: borders within chunks, at their ends, and two within one
    "stream": ([0, 1, 3, 5, 25, 26, 40], [1, 2, 2, 20, 1, 14]),
}


# Megatron divides a loss of multi-token prediction by the number of tokens of each context-parallel rank, so only equal
# numbers give the gradients of one rank. The losses of these tokens do not count. Each of 2 or 4 ranks has as many of
# them, also after the mask has moved by one or two tokens.
UNPREDICTED = [0, 1, 8, 9, 13, 14, 18, 19]


def data(step: int, dp_rank: int, dp_size: int, packing: str | None, heads: bool = False, whole: bool = False):
    """This rank's micro-batches of a step: (tokens, labels, mask of losses, PackedSeqParams or None).

    They are the rank's part of the sequences, or with `whole` the whole sequences.
    """
    tokens, labels = harness.batch(seed=step, size=global_batch(packing))
    mask = (torch.rand(tokens.shape, generator=torch.Generator().manual_seed(step)) < 0.7).float()
    if heads:
        mask[:] = 1
        mask[:, UNPREDICTED] = 0
    params = None
    if packing:
        borders, real = PACKINGS[packing]
        sizes = [end - start for start, end in itertools.pairwise(borders)]
        params = harness.packed_seq_params(real, sizes)
        for start, end, length in zip(borders, borders[1:], real, strict=False):
            mask[:, start + length : end] = 0
    for rows in zip(*(x.split(micro_batch(packing)) for x in (tokens, labels, mask)), strict=True):
        if dp_rank == 0:
            yield *(rows if whole else _own_tokens(rows, packing)), params
        dp_rank = (dp_rank - 1) % dp_size


def documents(step: int, dp_rank: int, dp_size: int, config):
    """Return Megatron's loader for hybrid context parallelism, over the documents of a step.

    It chooses the ranks that compute each document.
    """
    from megatron.core.datasets.data_schedule import HybridCPDataLoaderWrapper

    samples = [
        {"tokens": tokens[0], "labels": labels[0], "loss_mask": mask[0], "cu_seqlens": params.cu_seqlens_q_padded}
        for tokens, labels, mask, params in data(step, dp_rank, dp_size, "documents", whole=True)
    ]
    return HybridCPDataLoaderWrapper(iter([samples]), config)


def own_ranks(document: dict):
    """Return this rank's part of a document, as `data` returns a micro-batch."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    num_ranks = int(document.pop("local_cp_size"))
    params = harness.packed_seq_params([len(document["tokens"])])
    params.local_cp_size = num_ranks
    own = {name: x[None] for name, x in document.items()}
    if num_ranks > 1:
        params.cp_group = parallel_state.get_hybrid_data_context_parallel_groups(group_size=num_ranks)
        own = get_batch_on_this_cp_rank(own | {"cu_seqlens": None}, is_hybrid_cp=False, cp_group=params.cp_group)
    return own["tokens"], own["labels"], own["loss_mask"], params


def global_batch(packing: str | None) -> int:
    """Return the number of rows of a step."""
    return 4 if packing else 8


def micro_batch(packing: str | None) -> int:
    """Return the number of rows of a micro-batch.

    A row of packed sequences is a micro-batch of its own. Otherwise, a rank has two micro-batches of a step, which is
    enough to add up gradients. More would only take time, because each one makes the same collectives over gloo. A
    pipeline without data parallelism has four, so that its stages also take forwards and backwards in turn.
    """
    from megatron.core import parallel_state

    if packing:
        return 1
    alone = parallel_state.get_data_parallel_world_size() * parallel_state.get_pipeline_model_parallel_world_size() == 1
    return 4 if alone else 2


def _own_tokens(rows, packing: str | None):
    """The context parallel rank's; those of packed documents without Megatron's partitioner, which needs TE."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank
    from reference_attention import own_tokens

    group = parallel_state.get_context_parallel_group()
    if packing:
        places = own_tokens(rows[0].shape[1], PACKINGS[packing][0], packing, group.rank(), group.size())
        return [x[:, places] for x in rows]
    batch = dict(zip(("tokens", "labels", "loss_mask"), rows, strict=True), cu_seqlens=None)
    own = get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)
    return own["tokens"], own["labels"], own["loss_mask"]


def _positions(tokens):
    """Megatron 0.18 moves them along with the tokens of multi-token prediction; no model here reads them."""
    return torch.zeros_like(tokens)


def forward_step(data_iterator, model, return_schedule_plan=False):
    batch = next(data_iterator)
    tokens, labels, mask, params = own_ranks(batch) if model.config.hybrid_context_parallel else batch

    def loss_func(losses):
        if model.config.calculate_per_token_loss:
            total, count = (losses * mask).sum(), mask.sum()
            return total, count.int(), {"loss": torch.stack((total, count)).detach()}
        # Megatron sums over context parallel ranks what it averages over the others
        loss = losses.mean() / model.config.context_parallel_size
        return loss, {"loss": torch.stack((losses.mean(), torch.ones(()))).detach()}

    # the mask counts in the losses of multi-token prediction
    forward = model.build_schedule_plan if return_schedule_plan else model
    return forward(tokens, _positions(tokens), None, labels=labels, loss_mask=mask, packed_seq_params=params), loss_func


def backward(chunks, optimizer, step: int, packing: str | None) -> torch.Tensor | None:
    """Compute the gradients of a step. Return the loss of the global batch on the last stage, None on the others."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    dp_group = parallel_state.get_data_parallel_group()
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    heads = bool(chunks[0].module.config.mtp_num_layers)
    if chunks[0].config.hybrid_context_parallel:
        iterators = [documents(step, dp_group.rank(), dp_group.size(), chunks[0].config)]
    else:
        iterators = [data(step, dp_group.rank(), dp_group.size(), packing, heads) for _ in chunks]
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks,
        num_microbatches=global_batch(packing) // (micro_batch(packing) * dp_group.size()),
        seq_length=harness.SEQ,
        micro_batch_size=micro_batch(packing),
    )
    if not reports:
        return None
    total = sum(report["loss"] for report in reports)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]


def run(model: dict, layout: dict, weights: dict) -> dict:
    """Return this rank's losses and gradient norms of every step, gradients of the first, and weights at the end."""
    chunks, optimizer = parity.build(model, layout, weights)
    losses, norms = [], []
    for step in range(model.get("steps", parity.STEPS)):
        loss = backward(chunks, optimizer, step, model.get("hgrn2_packed_layout"))
        if step == 0:
            result = {f"gradient {name}": x for name, x in parity.gradients(chunks, optimizer).items()}
        _, norm, _ = optimizer.step()
        norms.append(norm)
        if loss is not None:
            losses.append(loss)
    result |= {f"weight {name}": x for name, x in parity.weights_of(chunks).items()}
    result["gradient norms"] = torch.tensor(norms)
    if losses:
        result["losses"] = torch.stack(losses)
    return result


def use_reference_attention():
    """In the place of Megatron's own, which takes neither context parallelism nor packed sequences."""
    from megatron.core.models.backends import LocalSpecProvider
    from reference_attention import ReferenceAttention

    from hgrn2_megatron import sequence_requirements

    LocalSpecProvider.core_attention = lambda self: ReferenceAttention
    sequence_requirements.has_own_attention = lambda settings, hgrn2: False


def move_short_documents():
    """Documents of less than 12 tokens go to one rank, the others' states are handed on: both, in one packed row."""
    from hgrn2_megatron.context_parallel import operator as context_parallel

    context_parallel.state_cost = lambda qfv: 12 * qfv.shape[1] / harness.SEQ


def main(out: Path, cases: dict):
    harness.start_megatron(cpu_mode=True)
    use_reference_attention()
    offload_on_cpu.install()
    move_short_documents()
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    # A run that is repeated in the same folder needs new files for its ranks to meet.
    attempt, sizes = os.environ["TORCHELASTIC_RUN_ID"], None
    for name, case in cases.items():
        # it has a place for each head of the model that it met first
        MTPLossLoggingHelper.tracker.clear()
        offload_on_cpu.reset()
        delayed_linear.install(case["layout"].get("config", {}).get("delay_wgrad_compute", False))
        print(time.strftime("%X"), name, flush=True)
        # Cases of the same sizes share process groups, because gloo sometimes waits forever while it makes them.
        if sizes == parity.group_sizes(case["layout"]) and "vpp" not in case["layout"]:
            parity.seed()
        else:
            parity.start_layout(case["layout"], out / f"meeting.{attempt}.{name}")
            sizes = parity.group_sizes(case["layout"])
        from megatron.core import parallel_state

        result = run(case["model"], case["layout"], torch.load(out / case["weights"]))
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            torch.save(result, out / f"{name}.{torch.distributed.get_rank()}")
        torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
