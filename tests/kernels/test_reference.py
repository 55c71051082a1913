"""The recurrence is what everything is compared with: check it against numbers worked out by hand."""

import math

import pytest
import torch

from hgrn2_kernels import recurrent_hgrn2


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_two_tokens_by_hand():
    b, scale, h = 0.25, 0.5, 2.0
    q, f, v = (-1.0, 3.0), (0.5, -2.0), (7.0, -4.0)
    want = []
    for q_t, f_t, v_t in zip(q, f, v, strict=True):
        forget = b + (1 - b) * sigmoid(f_t)
        h = forget * h + (1 - forget) * v_t
        want.append(scale * h * q_t * sigmoid(q_t))

    raw = [torch.tensor(x, dtype=torch.float64).view(1, 2, 1, 1) for x in (q, f, v)]
    bound, h0 = (torch.full(s, x, dtype=torch.float64) for s, x in (((1, 1), b), ((1, 1, 1, 1), 2.0)))
    o, ht = recurrent_hgrn2(*raw, bound, scale=scale, initial_state=h0, output_final_state=True)
    assert o.flatten().tolist() == pytest.approx(want, rel=1e-14)
    assert ht.item() == pytest.approx(h, rel=1e-14)


def test_state_is_a_running_average():
    # forget and k sum to 1: constant values come out unchanged once the state has forgotten its start
    torch.manual_seed(0)
    q, f = torch.randn(2, 1, 50, 2, 3, dtype=torch.float64)
    v = torch.full((1, 50, 2, 4), 1.5, dtype=torch.float64)
    h0 = torch.full((1, 2, 3, 4), 1.5, dtype=torch.float64)
    _, ht = recurrent_hgrn2(q, f, v, torch.rand(2, 3).double(), initial_state=h0, output_final_state=True)
    torch.testing.assert_close(ht, h0, rtol=1e-13, atol=0)
