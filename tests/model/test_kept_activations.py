"""The output of the mixer's norm is made again in the backward, and stays as it was for whoever holds it."""

import contextlib
import json

import harness
import pytest
import torch
from megatron.core.tensor_parallel.layers import LinearWithGradAccumulationAndAsyncCommunication
from torch.multiprocessing.reductions import StorageWeakRef

from hgrn2_megatron import mixer

LAYERS = 3


def build(**settings):
    """A model and its mixers."""
    harness.start_megatron()
    model = harness.build_model(num_layers=LAYERS, **settings)
    model.load_state_dict(harness.full_weights(model), strict=False)
    return model, [module for module in model.modules() if isinstance(module, mixer.HGRN2Mixer)]


def loss(model):
    return model(harness.batch()[0], None, None).square().sum()


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equals_what_autograd_keeps(model, monkeypatch):
    """Compare every gradient, to the last bit, with those where autograd keeps what the norm makes."""
    ours = gradients(model)
    with monkeypatch.context() as patch:
        patch.setattr(mixer, "recompute_in_backward", lambda x, user: None)
        kept = gradients(model)
    assert [name for name in kept if not torch.equal(ours[name], kept[name])] == []


def watch(mixers) -> list[StorageWeakRef]:
    """A list that gets the memory of what goes into each out_proj, without holding it."""
    watched: list[StorageWeakRef] = []
    for each in mixers:
        each.out_proj.register_forward_pre_hook(
            lambda module, args: watched.append(StorageWeakRef(args[0].untyped_storage()))
        )
    return watched


@pytest.mark.parametrize("settings", [{}, {"hybrid_layer_pattern": "M-M-M-"}], ids=["gpt", "stack"])
def test_what_nobody_holds_is_freed_between_forward_and_backward(settings, monkeypatch):
    model, mixers = build(**settings)
    watched = watch(mixers)
    total = loss(model)
    assert [memory.expired() for memory in watched] == [True] * LAYERS
    total.backward()
    assert_equals_what_autograd_keeps(model, monkeypatch)


OF_TWO_RANKS = """
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
import harness
torch.cuda.current_device = lambda: "cpu"
parallel_state.initialize_model_parallel(2, create_gloo_process_groups=False)
model_parallel_cuda_manual_seed(0, inference_rng_tracker=True)
from test_kept_activations import watch
for sequence_parallel in (False, True):
    model = harness.build_model(tp=2, sequence_parallel=sequence_parallel)
    watched = watch([layer.self_attention for layer in model.decoder.layers])
    total = model(harness.batch()[0], None, None).sum()
    print("freed", [memory.expired() for memory in watched])
    total.backward()
"""


def test_and_freed_under_tensor_and_sequence_parallelism():
    done = harness.python("-c", "import sys; sys.path.append('tests/model')" + OF_TWO_RANKS)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count(f"freed {[True] * LAYERS}") == 2, done.stdout[-3000:]


def test_and_kept_where_the_backward_follows_at_once():
    model, mixers = build()
    model.config.recompute_granularity = "full"
    spec = model.decoder.submodules.layer_specs[0].submodules.self_attention
    rebuilt = mixer.HGRN2Mixer(model.config, spec.submodules, layer_number=1)
    rebuilt.use_lower_bounds(model.decoder.hgrn2_bounds, 0)
    (x,) = torch.randn(1, 8, 2, 64, requires_grad=True)
    watched = watch([rebuilt])
    output, _ = rebuilt(x)
    assert not watched[0].expired()


FORMS = {
    "tensor": lambda x: x,
    "view": lambda x: x[0],
    "detached": lambda x: x.detach(),
    "detached-view": lambda x: x.detach()[1:].flatten(),
    "numpy": lambda x: x.detach().numpy(),
    "storage": lambda x: torch.empty(0).set_(x.untyped_storage()),
}
PLACES = {
    "norm": lambda each, take: each.norm.register_forward_hook(lambda module, args, y: take(y)),
    "before-out_proj": lambda each, take: each.out_proj.register_forward_pre_hook(lambda module, args: take(args[0])),
    "behind-out_proj": lambda each, take: each.out_proj.register_forward_hook(lambda module, args, y: take(args[0])),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_whoever_holds_it_finds_it_as_it_was(place, form, monkeypatch):
    model, mixers = build()
    kept, copies = [], []

    def take(x):
        kept.append(FORMS[form](x))
        copies.append(x.detach().clone())

    for each in mixers:
        PLACES[place](each, take)
    watched = watch(mixers)
    total = loss(model)
    assert [memory.expired() for memory in watched] == [False] * LAYERS
    # where it has been freed by force, a read would end the process
    assert all(x.untyped_storage().nbytes() for x in kept if isinstance(x, torch.Tensor))

    def assert_as_it_was():
        for x, copy in zip(kept, copies, strict=True):
            assert torch.equal(torch.as_tensor(x), torch.as_tensor(FORMS[form](copy)))

    assert_as_it_was()
    total.backward()
    assert_as_it_was()
    assert_equals_what_autograd_keeps(model, monkeypatch)


def double_in_place(module, args, y=None):
    with torch.no_grad():
        (args[0] if y is None else y).mul_(2)


def patch_forward(each):
    forward = each.norm.forward
    each.norm.forward = lambda x: forward(x) + 1


CHANGES = {
    "another-input-of-norm": lambda each: each.norm.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
    "another-output-of-norm": lambda each: each.norm.register_forward_hook(lambda module, args, y: 2 * y),
    "another-norm": patch_forward,
    "another-input-of-out_proj": lambda each: each.out_proj.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
    "output-of-norm-in-place": lambda each: each.norm.register_forward_hook(double_in_place),
    "input-of-out_proj-in-place": lambda each: each.out_proj.register_forward_pre_hook(double_in_place),
    "another-output-of-out_proj": lambda each: each.out_proj.register_forward_hook(lambda _, args, y: (y[0] * 2, None)),
    "full-backward-hook-of-norm": lambda each: each.norm.register_full_backward_hook(lambda _, dx, dy: (2 * dx[0],)),
    "full-backward-hook-of-out_proj": lambda each: each.out_proj.register_full_backward_hook(
        lambda _, dx, dy: (2 * dx[0],)
    ),
    "gradient-hook": lambda each: each.norm.register_forward_hook(
        lambda module, args, y: y.register_hook(lambda dy: 2 * dy) and None
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_hooks_change_has_the_gradient_of_the_change(change, monkeypatch):
    model, mixers = build()
    plain = gradients(model)
    for each in mixers:
        CHANGES[change](each)
    changed = gradients(model)
    assert not torch.equal(changed["embedding.word_embeddings.weight"], plain["embedding.word_embeddings.weight"])
    assert_equals_what_autograd_keeps(model, monkeypatch)


def test_hooks_run_once():
    model, mixers = build()
    calls = []
    for each in mixers:
        each.norm.register_forward_hook(lambda module, args, y: calls.append(y))
        each.out_proj.register_forward_hook(lambda module, args, y: calls.append(y))
    loss(model).backward()
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()),
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ],
    ids=["none", "save-on-cpu", "copies", "nothing"],
)
def test_saved_tensor_hooks_of_others_have_what_autograd_saves(context, monkeypatch):
    model, _ = build()
    with context():
        assert_equals_what_autograd_keeps(model, monkeypatch)


def test_a_layer_within_a_checkpoint_of_pytorch(monkeypatch):
    model, mixers = build()
    for each in mixers:
        each.forward = lambda x, forward=each.forward, **options: torch.utils.checkpoint.checkpoint(
            forward, x, use_reentrant=False, preserve_rng_state=False, **options
        )
    assert_equals_what_autograd_keeps(model, monkeypatch)


def test_a_backward_that_runs_twice_is_the_same(monkeypatch):
    model, _ = build()
    monkeypatch.setattr(torch.Tensor, "backward", lambda x: [_backward(x, retain_graph=True), _backward(x)])
    assert_equals_what_autograd_keeps(model, monkeypatch)


_backward = torch.Tensor.backward


def test_the_backward_of_out_proj_sees_the_weight_itself(monkeypatch):
    # Megatron and Transformer Engine read what data parallelism has put on it
    model, mixers = build()
    seen, backward = [], LinearWithGradAccumulationAndAsyncCommunication.backward

    def see(ctx, dy):
        seen.append(ctx.saved_tensors[1])
        return backward(ctx, dy)

    monkeypatch.setattr(LinearWithGradAccumulationAndAsyncCommunication, "backward", staticmethod(see))
    loss(model).backward()
    for each in mixers:
        assert any(weight is each.out_proj.weight for weight in seen)


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_the_same_on_a_gpu(implementation, settings):
    if implementation == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    settings = settings | {"transformer_impl": implementation}
    done = harness.python("tests/model/kept_activations.py", json.dumps(settings))
    assert done.returncode == 0 and "gradients equal" in done.stdout, done.stdout[-3000:]
