"""Derivatives and transforms that the operators do not have: they are refused, because PyTorch would leave them out."""

import pytest
import torch
from torch.autograd import forward_ad

from hgrn2_kernels import chunk_hgrn2, chunk_hgrn2_fused, recurrent_hgrn2, shard_states, step_hgrn2, torch_ops
from hgrn2_kernels.inputs import Inputs

Q, F, V = torch.randn(3, 1, 8, 2, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
BOUND = torch.full((2, 16), 0.2)
# each is a function of one tensor like V
OPERATORS = {
    "chunk": lambda x: chunk_hgrn2(Q, F, x, BOUND)[0],
    "chunk, bound": lambda x: chunk_hgrn2(Q, F, V, BOUND * x[0, 0].sigmoid())[0],
    "chunk, initial state": lambda x: chunk_hgrn2(Q, F, V, BOUND, initial_state=x[0, 0, None, ..., None] * V[0, 0, 0])[
        0
    ],
    "fused": lambda x: chunk_hgrn2_fused(torch.stack([Q, F, x], 3), BOUND)[0],
    "shard_states": lambda x: shard_states(F, x, BOUND)[0],
    "step": lambda x: step_hgrn2(Q, F, x, BOUND, torch.zeros(1, 2, 16, 16)),
}
TRANSFORMS = {
    "jvp": lambda function: torch.func.jvp(function, (V,), (V,)),
    "jacfwd": lambda function: torch.func.jacfwd(function)(V),
    "grad": lambda function: torch.func.grad(lambda x: function(x).sum())(V),
    "grad of vmap": lambda function: torch.func.grad(lambda x: torch.func.vmap(function)(x[None]).sum())(V),
    "compiled jvp": lambda function: torch.compile(
        lambda x: torch.func.jvp(function, (x,), (x,))[1], backend="aot_eager"
    )(V),
}


def tangent(function):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(V, V))).tangent


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("transform", [*TRANSFORMS, "dual level"])
def test_a_derivative_that_would_be_left_out_is_refused(operator, transform):
    run = TRANSFORMS.get(transform, tangent)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives.*recurrent_hgrn2"):
        run(OPERATORS[operator])


def test_other_calls_in_a_dual_level_are_not_refused():
    expected = chunk_hgrn2(Q, F, V, BOUND)[0]
    with forward_ad.dual_level():
        assert torch.equal(chunk_hgrn2(Q, F, V, BOUND)[0], expected)


def test_the_recurrence_has_these_derivatives():
    def function(x):
        return recurrent_hgrn2(Q, F, x, BOUND)[0]

    # the output is linear in v
    expected = function(V)
    assert torch.allclose(tangent(function), expected, atol=1e-6)
    assert torch.allclose(torch.func.jvp(function, (V,), (V,))[1], expected, atol=1e-6)
    leaf = V.clone().requires_grad_()
    chunk_hgrn2(Q, F, leaf, BOUND)[0].sum().backward()
    assert torch.allclose(torch.func.grad(lambda x: function(x).sum())(V), leaf.grad, atol=1e-6)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "PyTorch"])
def test_vmap_runs_the_calls_one_after_the_other(kernels):
    def function(x):
        return torch_ops.chunk(Inputs(Q, F, x, BOUND, None, None, 0.25), True, kernels=kernels)

    several = torch.stack([V, -2 * V, V.flip(1)])
    for found, expected in zip(
        torch.func.vmap(function)(several), zip(*map(function, several), strict=True), strict=True
    ):
        assert torch.equal(found, torch.stack(expected))


def test_batched_gradients_of_the_kernels_are_refused():
    leaf = V.clone().requires_grad_()
    o, _ = torch_ops.chunk(Inputs(Q, F, leaf, BOUND, None, None, 0.25), False)
    gradients = torch.randn(3, *o.shape)
    with pytest.raises(NotImplementedError, match="one after the other"):
        torch.autograd.grad(o, leaf, gradients, is_grads_batched=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match="one after the other"):
        torch.func.vmap(lambda do: torch.autograd.grad(o, leaf, do))(gradients)


def test_a_tensor_as_scale_is_refused():
    for run in (
        lambda scale: chunk_hgrn2(Q, F, V, BOUND, scale=scale),
        lambda scale: chunk_hgrn2_fused(torch.stack([Q, F, V], 3), BOUND, scale=scale),
        lambda scale: step_hgrn2(Q, F, V, BOUND, torch.zeros(1, 2, 16, 16), scale=scale),
    ):
        with pytest.raises(ValueError, match="scale must be a number"):
            run(torch.tensor(0.5, requires_grad=True))


def test_autocast_changes_neither_the_recurrence_nor_a_step():
    def results():
        state = torch.zeros(1, 2, 16, 16)
        return recurrent_hgrn2(Q, F, V, BOUND)[0], step_hgrn2(Q, F, V, BOUND, state), state

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, results(), expected))


def test_a_step_takes_meta_tensors():
    q, f, v, bound = (x.to("meta") for x in (Q, F, V, BOUND))
    assert step_hgrn2(q, f, v, bound, torch.zeros(1, 2, 16, 16, device="meta")).shape == V.shape
