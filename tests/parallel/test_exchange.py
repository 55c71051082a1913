"""What context parallel ranks send each other, and how much, for more ranks than there are; a batch is not copied."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
import torch

COUNT = """
import json, sys, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
sent = 0

def all_to_all_single(received, x, output_split_sizes=None, input_split_sizes=None, group=None, **ignored):
    global sent
    own = x.numel() // group.size() if input_split_sizes is None else input_split_sizes[0] * x[0].numel()
    sent += (x.numel() - own) * x.element_size()
    received.zero_()

torch.distributed.all_to_all_single = all_to_all_single
torch.cuda.current_device = lambda: "cpu"
from hgrn2_megatron.context_parallel.operator import chunk_hgrn2_of_packed, state_cost
from hgrn2_megatron.context_parallel.pieces import plan_tokens
for documents, length, cp, layout in json.loads(sys.argv[1]):
    torch.distributed.init_process_group("fake", rank=0, world_size=cp, store=FakeStore())
    qfv = torch.randn(1, documents * length // cp, 1, 3, 16).requires_grad_()
    borders = torch.arange(documents + 1).mul(length).int()
    sent = 0
    chunk_hgrn2_of_packed(qfv, None, torch.distributed.group.WORLD, borders, layout).sum().backward()
    plan = plan_tokens(borders, qfv.shape[1], layout, 0, cp, state_cost(qfv))
    print("sent", sent, qfv.shape[1] - plan.num_local)
    torch.distributed.destroy_process_group()
"""


def test_the_formula_is_what_is_sent():
    from hgrn2_megatron.context_parallel.exchange import bytes_sent

    # documents that are as many tokens as their states, or more, and shorter ones
    cases = [
        (documents, length, cp, layout)
        for cp in (8, 64)
        for documents, length in ((1, 2176), (16, 2176), (64, 512), (256, 128))
        for layout in ("documents", "stream")
    ]
    done = harness.python("-c", COUNT, json.dumps(cases))
    assert done.returncode == 0, done.stdout[-3000:]
    counts = [tuple(map(int, line.split()[1:])) for line in done.stdout.splitlines() if line.startswith("sent ")]
    assert len(counts) == len(cases)
    for (documents, length, cp, layout), (sent, moved) in zip(cases, counts, strict=True):
        tokens = documents * length // cp
        if layout == "stream":
            want = 0, bytes_sent(1, 0, 1, 16, cp, 4)
        elif length // cp < 2 * (2 * 16 + 1) / 4:
            want = tokens, bytes_sent(0, tokens, 1, 16, cp, 4)
        else:
            want = 0, bytes_sent(documents, 0, 1, 16, cp, 4)
        assert (moved, sent) == want, (documents, length, cp, layout)


class AllToAll:
    """torch.distributed.all_to_all_single among threads, each of which is a rank."""

    def __init__(self, ranks: int):
        self.sent, self.meeting = [()] * ranks, threading.Barrier(ranks, timeout=30)

    def __call__(self, received, x, group):
        self.sent[group.rank()] = x.chunk(group.size())
        self.meeting.wait()
        received.copy_(torch.cat([chunks[group.rank()] for chunks in self.sent]))
        self.meeting.wait()


# channels that the ranks share evenly, and that they do not
@pytest.mark.parametrize(("cp", "n", "H", "K", "V"), [(2, 1, 2, 4, 4), (3, 2, 1, 5, 4), (4, 3, 2, 3, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_enters_each_piece_is_what_those_before_it_make(monkeypatch, cp, n, H, K, V, reverse):
    from hgrn2_kernels import combine_states
    from hgrn2_megatron.context_parallel.exchange import Exchange

    monkeypatch.setattr(torch.distributed, "all_to_all_single", AllToAll(cp))
    state, log_decay = torch.randn(cp, n, 2, H, K, V), -torch.rand(cp, n, 2, H, K)
    # no state passes this piece
    log_decay[0, 0, 1] = -torch.inf

    def exchange(rank):
        return Exchange(harness.Group(rank, cp))(state[rank].flatten(0, 1), log_decay[rank].flatten(0, 1), reverse)()

    with ThreadPoolExecutor(cp) as ranks:
        got = torch.stack(list(ranks.map(exchange, range(cp)))).unflatten(1, (n, 2))
    in_time = [torch.cat([x[:, :, 0], x[:, :, 1].flip(0)]) for x in (state, log_decay, got)]
    if reverse:
        in_time = [x.flip(0) for x in in_time]
    want, _ = combine_states(*in_time[:2])
    torch.testing.assert_close(in_time[2], want)


def test_a_batch_is_cut_into_chunks_without_a_copy(monkeypatch):
    from hgrn2_megatron.context_parallel import operator as context_parallel

    given = []

    def sharded(qfv, lower_bound, hand_on):
        given.append(qfv)
        return qfv[..., 2, :].contiguous()

    monkeypatch.setattr(context_parallel, "chunk_hgrn2_sharded", sharded)
    # tokens outside the batch, as projections come
    s, b, H, K = 6, 2, 3, 16
    qfv = torch.randn(s, b, H, 3, K)
    o = context_parallel.chunk_hgrn2_of_batch(qfv.transpose(0, 1), torch.rand(H, K), None)
    assert given[0].data_ptr() == qfv.data_ptr() and given[0].shape == (2, s // 2, b * H, 3, K)
    assert o.transpose(0, 1).is_contiguous() and torch.equal(o, qfv[..., 2, :].transpose(0, 1))


def test_a_rank_without_a_whole_document_takes_part_in_the_backward():
    from hgrn2_megatron.context_parallel.exchange import chunk_hgrn2_of_gathered
    from hgrn2_megatron.context_parallel.pieces import GatherPlan

    harness.start_megatron()
    none = torch.zeros(0, dtype=torch.int64)
    plan = GatherPlan(none, none, sizes=[0], order=none, inverse=none, cu_seqlens=torch.zeros(1, dtype=torch.int32))
    # what comes in needs no gradient, the bound does
    bound = torch.rand(2, 16, requires_grad=True)
    o = chunk_hgrn2_of_gathered(torch.randn(1, 0, 2, 3, 16), bound, torch.distributed.group.WORLD, plan)
    assert o.shape == (1, 0, 2, 16) and o.requires_grad
    o.sum().backward()
    assert torch.equal(bound.grad, torch.zeros(2, 16))
