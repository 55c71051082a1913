"""Checked patching: an unknown target is refused, the original is kept, and no patch goes another way."""

import re
import sys
import types

import harness
import pytest
import torch

from hgrn2_megatron.patching import change_class, wrap

PACKAGE = harness.ROOT / "hgrn2_megatron"


class Base:
    def forward(self, x):
        return x

    @staticmethod
    def double(x):
        return 2 * x


class Child(Base):
    def forward(self, x):
        return -x


@pytest.fixture
def owner(monkeypatch):
    """A module with a function and a class, and another module that has the function by name."""
    module, user = types.ModuleType("megatron.owner"), types.ModuleType("megatron.user")
    module.run = user.run = lambda first, second=0: first
    module.Base = type("Base", (Base,), {"__module__": module.__name__})
    for x in (module, user):
        monkeypatch.setitem(sys.modules, x.__name__, x)
    return module


def test_a_wrapped_function_is_replaced_once_wherever_it_is_bound_and_keeps_the_original(owner):
    original = owner.run
    for _ in range(2):
        wrap(owner, "run", ["first"], lambda run: lambda *args: run(*args) + 1)
    assert owner.run(1) == 2 and owner.run is sys.modules["megatron.user"].run
    assert owner.run._hgrn2_original is original


def test_a_static_method_stays_one(owner):
    wrap(owner.Base, "double", ["x"], lambda double: lambda x: double(x) + 1)
    assert owner.Base().double(2) == owner.Base.double(2) == 5


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("gone", ["x"], "Megatron release: megatron.owner.gone is missing or has no signature"),
        (
            "run",
            ["second"],
            r"Megatron release: megatron.owner.run has parameters .'first', 'second'., expected .'second'.",
        ),
    ],
)
def test_an_unknown_target_is_refused_and_left_alone(name, parameters, message, owner):
    before = dict(vars(owner))
    with pytest.raises(RuntimeError, match=message):
        wrap(owner, name, parameters, lambda original: lambda: None)
    assert vars(owner) == before


def test_an_unknown_release_of_pytorch_is_named():
    with pytest.raises(RuntimeError, match="PyTorch release: torch.cuda.device_count has parameters"):
        wrap(torch.cuda, "device_count", ["host"], lambda original: original)


def test_an_object_changes_to_a_subclass_whose_base_is_known():
    layer = Base()
    layer.weight = 1
    change_class(layer, Child, "forward", ["self", "x"])
    assert type(layer) is Child and layer.weight == 1 and layer._hgrn2_original is Base
    with pytest.raises(RuntimeError, match="Base.forward has parameters"):
        change_class(Base(), Child, "forward", ["self", "y"])
    with pytest.raises(TypeError, match="Child derives from"):
        change_class(Child(), Child, "forward", ["self", "x"])


def test_every_patch_is_checked_but_two_that_say_why():
    text = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert {name for name, code in text.items() if re.search(r"__class__ =|\bsetattr\((?!args, name)", code)} == {
        "patching.py"
    }
    assigned = re.findall(r"^ *((?:torch|threading|megatron)\.[\w.]+) = ", "\n".join(text.values()), re.MULTILINE)
    assert assigned == ["torch.Generator", "torch.Tensor.record_stream"]
    assert "Unchecked: torch.Generator and record_stream" in text["cpu.py"]


KEPT = """
from hgrn2_megatron import cpu
cpu.install()
import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.training import initialize, training
for target in (
    torch.autograd._engine_run_backward, torch.cuda.Stream, torch.cuda.random.get_rng_state,
    DistributedOptimizer.load_state_dict, initialize.initialize_megatron, training.set_jit_fusion_options,
):
    print(target.__name__, target._hgrn2_original is not target)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU mode is off where there is a GPU")
def test_the_cpu_mode_keeps_every_original():
    done = harness.python("-c", KEPT)
    assert done.returncode == 0 and done.stdout.count(" True") == 6, done.stdout
