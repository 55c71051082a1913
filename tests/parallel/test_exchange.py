"""Bytes that context parallel ranks send each other, counted where they are sent, for more ranks than there are."""

import json

import harness
import pytest

COUNT = """
import json, sys, torch
from torch.testing._internal.distributed.fake_pg import FakeStore
documents, length, cp, layout = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
sent = 0

def all_to_all_single(received, x, output_split_sizes=None, input_split_sizes=None, group=None, **ignored):
    global sent
    own = x.numel() // cp if input_split_sizes is None else input_split_sizes[0] * x[0].numel()
    sent += (x.numel() - own) * x.element_size()
    received.zero_()

torch.distributed.all_to_all_single = all_to_all_single
torch.cuda.current_device = lambda: "cpu"
torch.distributed.init_process_group("fake", rank=0, world_size=cp, store=FakeStore())
from hgrn2_megatron.context_parallel import chunk_hgrn2_of_packed, state_cost
from hgrn2_megatron.pieces import deal_of
qfv = torch.randn(1, documents * length // cp, 1, 3, 16).requires_grad_()
borders = torch.arange(documents + 1).mul(length).int()
group = torch.distributed.group.WORLD
chunk_hgrn2_of_packed(qfv, None, group, borders, layout).sum().backward()
deal = deal_of(borders, qfv.shape[1], layout, 0, cp, state_cost(qfv))
print("sent", json.dumps([sent, qfv.shape[1] - deal.num_stay]))
"""
# tokens a document, of which some ranks have as much as states take and some have less
LONG, SHORT = 2048, 128


@pytest.mark.parametrize(("documents", "cp"), [(n, cp) for n in (1, 16) for cp in (8, 64)] + [(256, 8)])
@pytest.mark.parametrize("layout", ["documents", "stream"])
def test_the_formula_is_what_is_sent(documents, cp, layout):
    from hgrn2_megatron.exchange import bytes_sent

    length = LONG if documents < 256 else SHORT
    done = harness.python("-c", COUNT, *map(str, (documents, length, cp, layout)))
    assert done.returncode == 0, done.stdout[-3000:]
    sent, moved = json.loads(done.stdout.split("sent ")[-1])
    if layout == "stream":
        assert moved == 0 and sent == bytes_sent(1, 0, 1, 16, cp, 4)
    elif moved:
        assert moved == documents * length // cp and sent == bytes_sent(0, moved, 1, 16, cp, 4)
    else:
        assert sent == bytes_sent(documents, 0, 1, 16, cp, 4)
