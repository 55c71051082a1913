"""Every autograd.Function and differentiable operator of the packages: its second derivatives, and torch.compile.

A second derivative is right or refused, whichever way it is asked for: PyTorch would take a gradient that came without
a graph for a constant.
"""

import ast
from functools import partial

import harness
import pytest
import torch
from operator_cases import bounds, hand_on, relative_error
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from hgrn2_kernels import chunk_hgrn2, chunk_hgrn2_sharded, op, recurrent_hgrn2, shard_states, torch_ops
from hgrn2_kernels.inputs import Inputs
from hgrn2_megatron import chunked_loss, lower_bounds, norm
from hgrn2_megatron.context_parallel import exchange

WORLD = torch.distributed.group
B, T, H, K = 1, 16, 1, 4


@pytest.fixture(autouse=True, scope="module")
def megatron():
    harness.start_megatron()


@pytest.fixture(autouse=True)
def compiler():
    torch._dynamo.reset()
    # the CPU mode of Megatron's loop turns it off, for the whole process
    with torch._dynamo.config.patch(disable=False):
        yield
    torch._dynamo.reset()


def chunk_by_kernels(q, f, v, b, h0):
    return torch_ops.chunk(Inputs(q, f, v, b, h0, None, 0.5), True)


def chunk_in_pytorch(q, f, v, b, h0):
    return chunk_hgrn2(q, f, v, b, initial_state=h0, output_final_state=True)


def sharded_norm(x, weight):
    return norm._sharded_rms_norm(x, weight, 8, 1e-5, WORLD.WORLD)


def loss_by_chunks(hidden, weight):
    labels = torch.arange(len(hidden)) % len(weight)
    return chunked_loss._chunked_loss(hidden, weight, labels, 3, 2.0, WORLD.WORLD, False)


def permuted(x):
    order = torch.tensor([2, 0, 1])
    return exchange.permute(x, order, order.argsort())


def tokens(number, *last):
    return torch.randn(number, B, T, H, *last or (K,)).unbind()


def bound():
    return bounds("learned", H, K).float()


STATE = (B, H, K, K)
# of each function or operator a call and its inputs: those that have no second derivative
REFUSING = {
    "Chunk": (chunk_by_kernels, lambda: (*tokens(3), bound(), torch.randn(STATE))),
    "hgrn2::chunk": (chunk_in_pytorch, lambda: (*tokens(3), bound(), torch.randn(STATE))),
    "hgrn2::shard_states": (shard_states, lambda: (*tokens(2), bound())),
    "Sharded": (lambda qfv, b: chunk_hgrn2_sharded(qfv, b, hand_on(1)), lambda: (*tokens(1, 3, K), bound())),
    "_ShardedRMSNorm": (sharded_norm, lambda: (torch.randn(5, 8), torch.randn(8))),
    "_ChunkedLoss": (loss_by_chunks, lambda: (torch.randn(8, 6), torch.randn(5, 6))),
}
RIGHT = {
    "_Permute": (permuted, lambda: (torch.randn(1, 3, 4),)),
    "_Tie": (lower_bounds._Tie.apply, lambda: (torch.randn(3, 4), torch.randn(2, 2))),
}
# by which the others refuse
THEMSELVES = {"_Refusal"}


def of(name, dtype=torch.float32):
    torch.manual_seed(0)
    function, inputs = (REFUSING | RIGHT)[name]
    return function, [x.to(dtype).requires_grad_() for x in inputs()]


def first(results):
    return results if isinstance(results, torch.Tensor) else results[0]


def test_none_is_forgotten():
    found = set()
    for path in [*harness.ROOT.glob("hgrn2_megatron/**/*.py"), *harness.ROOT.glob("kernels/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(x).endswith("Function") for x in node.bases):
                found.add(node.name)
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("differentiate", "custom_op")):
                found.add(f"hgrn2::{ast.literal_eval(node.args[0])}")
    assert found == REFUSING.keys() | RIGHT.keys() | THEMSELVES


def refused(call):
    with pytest.raises(NotImplementedError, match="second derivative.*: leave create_graph out, or"):
        call()


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("form", ["pytorch", "triton"])
def test_a_second_derivative_is_refused(name, form, monkeypatch):
    monkeypatch.setattr(op, "implementation", lambda *where: form)
    function, inputs = of(name)
    for n, x in enumerate(inputs):
        plain = torch.autograd.grad(first(function(*inputs)).sum(), x)[0]
        weights = torch.ones_like(first(function(*inputs)), requires_grad=True)
        for given in (torch.ones_like(weights), weights):
            (gradient,) = torch.autograd.grad(first(function(*inputs)), x, given, create_graph=True)
            assert torch.equal(gradient, plain) and gradient.requires_grad
            penalty = gradient.square().sum()
            # by everything, by the inputs, by one that the gradient may not depend on, by the gradient that came in
            refused(partial(penalty.backward, retain_graph=True))
            refused(partial(torch.autograd.grad, penalty, inputs, allow_unused=True, retain_graph=True))
            refused(partial(torch.autograd.grad, penalty, inputs[1 - n], allow_unused=True, retain_graph=True))
            if given is weights:
                refused(partial(torch.autograd.grad, penalty, weights))


@pytest.mark.parametrize("name", REFUSING)
def test_by_every_other_way_too(name):
    function, inputs = of(name)

    def loss(*inputs):
        return first(function(*inputs)).sin().sum()

    refused(lambda: torch.autograd.functional.hvp(loss, tuple(inputs), tuple(map(torch.ones_like, inputs))))
    refused(lambda: torch.autograd.functional.hessian(loss, tuple(inputs)))
    gradients = torch.autograd.grad(checkpoint(loss, *inputs, use_reentrant=False), inputs, create_graph=True)
    refused(sum(x.sum() for x in gradients).backward)
    with pytest.raises(RuntimeError):
        torch.func.hessian(loss)(*inputs)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError):
        loss(*(torch.autograd.forward_ad.make_dual(x, x.detach()) for x in inputs))


@pytest.mark.parametrize("name", REFUSING)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_too(name, backend):
    function, inputs = of(name)
    compiled = torch.compile(lambda *x: 2 * first(function(*x)), backend=backend)
    gradients = torch.autograd.grad(compiled(*inputs).sum(), inputs, create_graph=True)
    # what aot_autograd has compiled refuses by itself
    with pytest.raises(RuntimeError, match="second derivative|does not currently support double backward"):
        sum(x.square().sum() for x in gradients).backward()


@pytest.mark.parametrize("name", RIGHT)
def test_a_second_derivative_is_right(name):
    function, inputs = of(name, torch.float64)
    assert torch.autograd.gradcheck(function, inputs) and torch.autograd.gradgradcheck(function, inputs)


def test_what_the_operators_point_to_has_second_derivatives():
    function, inputs = of("hgrn2::chunk", torch.float64)
    leaves = [x[:, :4].detach().requires_grad_() for x in inputs[:3]] + inputs[3:]

    def recurrence(q, f, v, b, h0):
        return recurrent_hgrn2(q, f, v, b, initial_state=h0, output_final_state=True)

    assert torch.autograd.gradgradcheck(recurrence, leaves)


@pytest.mark.parametrize("name", ["_ShardedRMSNorm", "_ChunkedLoss", *RIGHT])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled_they_give_eager_results_and_gradients(name, backend):
    function, inputs = of(name)
    counter = CompileCounterWithBackend(backend)

    def around(*x):
        shifted = [y + 1 for y in x]
        return 2 * function(*shifted)

    results = []
    for call in (torch.compile(around, backend=counter), around):
        y = call(*inputs)
        weights = torch.linspace(0.5, 1.5, y.numel()).view(y.shape)
        results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), inputs)])
    assert counter.frame_count
    for got, want in zip(*results, strict=True):
        assert relative_error(got, want) <= 1e-6
    assert all(x.any() for x in results[1][: 2 if name == "_Tie" else None])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_the_loss_adds_to_main_grad(backend):
    _, (hidden, weight) = of("_ChunkedLoss")
    labels = torch.arange(len(hidden)) % len(weight)
    sums = []
    for compiles in (True, False):
        weight.main_grad, weight.grad_added_to_main_grad = torch.ones_like(weight), False

        def loss(hidden, weight):
            return 2 * chunked_loss._chunked_loss(hidden, weight, labels, 3, 1.0, WORLD.WORLD, True)

        y = (torch.compile(loss, backend=backend) if compiles else loss)(hidden, weight)
        y.sum().backward()
        assert weight.grad_added_to_main_grad
        sums.append(weight.main_grad)
    assert torch.equal(*sums) and not torch.equal(sums[0], torch.ones_like(weight))
