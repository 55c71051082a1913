"""The cache of how packed tokens are dealt out: it answers for the borders that are there now."""

import argparse
import types

import pytest
import torch

from hgrn2_megatron import UsageError
from hgrn2_megatron.context_parallel import operator as context_parallel
from hgrn2_megatron.context_parallel.pieces import TokenPlan, plan_tokens

BORDERS = [0, 16, 24, 32, 40]
QUESTION = dict(num_tokens=10, layout="documents", rank=1, cp=4, state_cost=3.0)


def same(a: TokenPlan, b: TokenPlan) -> bool:
    """Compare by what is printed, which is whole for a few numbers."""
    return str(a) == str(b)


def answer(borders: list[int], **question) -> TokenPlan:
    return plan_tokens(torch.tensor(borders, dtype=torch.int32), **QUESTION | question)


@pytest.mark.parametrize(
    "change",
    [{"num_tokens": 12}, {"layout": "stream"}, {"rank": 3}, {"cp": 2, "num_tokens": 20}, {"state_cost": 5.0}],
    ids=str,
)
def test_another_question_about_the_same_borders_has_its_own_answer(change):
    borders = torch.tensor(BORDERS, dtype=torch.int32)
    first = plan_tokens(borders, **QUESTION)
    second = plan_tokens(borders, **QUESTION | change)
    assert not same(first, second) and same(second, answer(BORDERS, **change))
    assert plan_tokens(borders, **QUESTION) is first


@pytest.mark.parametrize("inference", [False, True])
def test_other_borders_in_the_same_tensor_have_their_own_answer(inference):
    with torch.inference_mode(inference):
        borders = torch.tensor(BORDERS, dtype=torch.int32)
        first = plan_tokens(borders, **QUESTION)
        assert plan_tokens(borders, **QUESTION) is first
        borders[1:4] += 8
        second = plan_tokens(borders, **QUESTION)
    assert not same(first, second) and same(second, answer([0, 24, 32, 40, 40]))


@pytest.mark.parametrize("state_cost", [0.0, 3.0, 100.0], ids=["all-stay", "some-move", "all-move"])
def test_tokens_behind_the_last_document_stay(state_cost):
    without, with_some = (answer(BORDERS, num_tokens=n, state_cost=state_cost) for n in (10, 13))
    assert with_some.num_local == without.num_local + 3
    assert with_some.pieces.cu_seqlens[-1] == with_some.num_local
    # and no state enters or leaves them
    assert with_some.pieces.entered[-1] == with_some.pieces.left[-1] == -1
    if with_some.gather:
        places = with_some.gather.split[: with_some.num_local]
        assert places[-3:].tolist() == [10, 11, 12]


def test_documents_that_move_are_as_many_tokens_on_every_rank():
    # the longest, which comes last, is as long as the other two
    assert answer([0, 4, 8, 16], num_tokens=8, cp=2, state_cost=100.0).gather.sizes == [4, 4]


def test_the_config_says_how_packed_sequences_are_dealt_out_before_the_command_line_does(monkeypatch):
    # what the command line alone says is in inference.py
    monkeypatch.setattr(context_parallel, "global_args", lambda: argparse.Namespace(sft=True))
    config = types.SimpleNamespace(hgrn2_packed_layout="stream")
    assert context_parallel.packed_layout(config) == "stream"
    config.hgrn2_packed_layout = "rows"
    with pytest.raises(UsageError, match='must be "documents" or "stream", got \'rows\''):
        context_parallel.packed_layout(config)


def test_sequences_that_are_not_cut_into_chunks_are_refused():
    with pytest.raises(ValueError, match="a packed sequence of 12 tokens cannot be cut into 2 [*] 4 equal chunks"):
        answer([0, 12, 40])
    with pytest.raises(ValueError, match="has 13 tokens, which cannot be cut into two equal chunks"):
        answer(BORDERS, layout="stream", num_tokens=13)
