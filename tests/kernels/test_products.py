"""Products of shapes, gates, packing, states and layouts of memory, drawn at random, because faults hide in products.

    PRODUCTS=3 python -m pytest -p no:xdist tests/kernels/test_products.py

PRODUCTS is a seed, and each seed draws other products. Without it a few products of seed 0 run.
"""

import dataclasses
import os
import random

import pytest
import torch
from operator_cases import ALL_GATES, NAMES, make_inputs

from hgrn2_kernels import chunk_plan, recurrent_hgrn2, torch_ops, triton_math
from hgrn2_kernels.inputs import Inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 60 if "PRODUCTS" in os.environ else 6
# Relative Frobenius errors of fp32. Sums in another order, and exp2, log2 and reciprocals of a GPU, make less.
CEILING = 1e-5
# Bands round their exponents to 2^-13. The gradient of f comes from differences of sums over a chunk. Where gates are
# open, the differences are small, and their rounding reaches tokens of the same chunk whose gates are closed.
HIGHER = 1e-4
# What decays below this norm is not in the range of fp32.
TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Product:
    """A call of the operator.

    Attributes:
        shape: B, T, H, K and V.
        gates: a gate of ALL_GATES for each third of the tokens.
        bound: a kind of operator_cases.bounds.
        cu_seqlens: boundaries of packed sequences, or None.
        state: whether there is an initial state.
        layout: "apart", "views" of one projection in Megatron's order, or "fused", one projection and its gradient.
        results: names of the results that the loss is made of.
        frozen: names of the inputs without a gradient.
        save_states: whether the forward keeps its states.
        fill: programs that fill the GPU. More of them cut sequences into segments.
        bands: bands that the kernels may take in fp32. On a GPU they are compiled for one.
        seed: of the output's gradients.
    """

    shape: tuple[int, ...]
    gates: tuple[str, ...]
    bound: str
    cu_seqlens: tuple[int, ...] | None
    state: bool
    layout: str
    results: tuple[str, ...]
    frozen: tuple[str, ...]
    save_states: bool
    fill: int
    bands: int
    seed: int


def draw(seed: int) -> list[Product]:
    chance = random.Random(seed)
    return [_draw(chance, number) for number in range(COUNT)]


def _draw(chance: random.Random, number: int) -> Product:
    packed, cut = chance.random() < 0.5, chance.random() < 0.2
    T = chance.randint(768, 900) if cut else chance.choice([chance.randint(1, 140), 32, 64, 96, 128])
    B, H = (1, 1) if cut else (chance.randint(1, 3), chance.randint(1, 3))
    K = chance.choice([16, 24, 32] if cut else [16, 24, 32, 40, 64, 80, 128])
    layout = chance.choice(["apart", "views", "fused"])
    V = K if layout != "apart" or chance.random() < 0.5 else chance.choice([16, 24, 48, 64, 96])
    cu_seqlens = None
    if packed:
        B, count = 1, chance.randint(1, 6)
        borders = sorted(chance.choices(range(T + 1), k=count))
        # half of them end before the row does, and some sequences are empty
        cu_seqlens = (0, *borders) if chance.random() < 0.5 else (0, *borders[:-1], T)
    leaves = ["q", "f", "v"] if layout == "apart" else ["qfv"]
    return Product(
        shape=(B, T, H, K, V),
        gates=tuple(chance.choices(list(ALL_GATES), k=3)),
        bound=chance.choice(["none", "learned", "half-zero", "zero"]),
        cu_seqlens=cu_seqlens,
        state=chance.random() < 0.5,
        layout=layout,
        results=chance.choice([("o",), ("final_state",), ("o", "final_state"), ("o", "final_state")]),
        frozen=tuple(name for name in [*leaves, "bound", "state"] if chance.random() < 0.2),
        save_states=chance.random() < 0.5,
        fill=chance.choice([3, 6, 12]) if cut else 1,
        bands=chance.choice([1, 4]) if DEVICE == "cpu" else 1,
        seed=number,
    )


def inputs_of(product: Product) -> list[torch.Tensor | None]:
    """Return q, f, v, lower_bound and initial_state in fp64, on the CPU."""
    count = len(product.cu_seqlens) - 1 if product.cu_seqlens else None
    q, f, v, bound, state = make_inputs(product.shape, "plain", product.bound, N=count)
    thirds = [ALL_GATES[gate](part) for gate, part in zip(product.gates, f.chunk(3, dim=1), strict=False)]
    # what fp32 can hold, so that both sides compute the same
    return [x if x is None else x.float().double() for x in (q, torch.cat(thirds, 1), v, bound, state)]


def leaves_of(product: Product, inputs, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """Return the tensors that the call reads and that may have gradients, by name."""
    q, f, v, bound, state = (x if x is None else x.to(device, dtype) for x in inputs)
    leaves = {"q": q, "f": f, "v": v}
    if product.layout != "apart":
        # [T, B, H, 3, K], as a fused projection of Megatron returns it
        leaves = {"qfv": torch.stack((q, f, v), dim=3).transpose(0, 1).contiguous()}
    leaves |= {"bound": bound} if bound is not None else {}
    leaves |= {"state": state} if product.state else {}
    for name, x in leaves.items():
        leaves[name] = x.clone().requires_grad_(name not in product.frozen)
    return leaves


def results_of(product: Product, leaves: dict, kernels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    device = next(iter(leaves.values())).device
    borders = product.cu_seqlens and torch.tensor(product.cu_seqlens, dtype=torch.int32, device=device)
    bound, state, scale = leaves.get("bound"), leaves.get("state"), product.shape[3] ** -0.5
    if kernels and product.layout == "fused":
        qfv = leaves["qfv"].transpose(0, 1)
        return torch_ops.chunk_fused(qfv, bound, state, borders, scale, True, product.save_states)
    qfv = leaves["qfv"].transpose(0, 1).unbind(3) if "qfv" in leaves else [leaves[name] for name in "qfv"]
    if kernels:
        return torch_ops.chunk(Inputs(*qfv, bound, state, borders, scale), True, product.save_states)
    return recurrent_hgrn2(*qfv, bound, initial_state=state, output_final_state=True, cu_seqlens=borders, scale=scale)


def computed(product: Product, inputs, dtype: torch.dtype, device: str, kernels: bool) -> dict[str, torch.Tensor]:
    """Return the results of a call and the gradients of its leaves, by name."""
    leaves = leaves_of(product, inputs, dtype, device)
    results = dict(zip(NAMES[:2], results_of(product, leaves, kernels), strict=True))
    torch.manual_seed(product.seed)
    gradients = {name: torch.randn(x.shape, dtype=torch.float64).to(x) for name, x in results.items()}
    with_gradient = {name: x for name, x in leaves.items() if x.requires_grad}
    if with_gradient and any(results[name].requires_grad for name in product.results):
        chosen = [results[name] for name in product.results]
        torch.autograd.backward(chosen, [gradients[name] for name in product.results])
    found = {name: x.detach() for name, x in results.items()}
    return found | {f"d{name}": torch.zeros_like(x) if x.grad is None else x.grad for name, x in with_gradient.items()}


def parts_of(got: dict, want: dict):
    """Yield the name of a tensor, its part ("q", "f" or "v" in gradients, otherwise ""), and both sides, on the CPU."""
    for name, expected in want.items():
        if name == "dqfv":
            yield from zip([name] * 3, "qfv", got[name].cpu().unbind(3), expected.unbind(3), strict=True)
        else:
            yield name, name[1:] if name in ("dq", "df", "dv") else "", got[name].cpu(), expected


@pytest.mark.parametrize("product", draw(int(os.environ.get("PRODUCTS", 0))), ids=lambda one: str(one.seed))
def test_a_product_is_the_recurrence(product, monkeypatch):
    monkeypatch.setattr(chunk_plan, "FILL", product.fill)
    monkeypatch.setattr(triton_math, "BANDS_FP32", triton_math.tl.constexpr(product.bands))
    inputs = inputs_of(product)
    want = computed(product, inputs, torch.float64, "cpu", kernels=False)
    got = computed(product, inputs, torch.float32, DEVICE, kernels=True)
    assert got.keys() == want.keys()
    for name, part, a, b in parts_of(got, want):
        if name == "dbound":
            # below this value the gradient of the bound is ill-conditioned, and at 0 it is defined as 0
            a, b = a[inputs[3] >= 1e-3], b[inputs[3] >= 1e-3]
        assert a.isfinite().all(), (name, product)
        error = ((a.double() - b).norm() / b.norm().clamp_min(TINY)).item()
        assert error <= (HIGHER if product.bands > 1 or part == "f" else CEILING), (name, part, error, product)
