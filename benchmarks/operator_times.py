"""Measure time and memory of chunk_hgrn2 on one GPU, and compare it with fla's HGRN2 path and with cuDNN attention.

    python benchmarks/operator_times.py [--shapes 8x4096x16 ...] [--fla 8x4096x16 ...] [--sweeps] [--out FILE.json]
    python benchmarks/operator_times.py --plot FILE.json PICTURE        draws the sweeps; needs no GPU

Shapes are batch x length x heads, with heads of 128 channels, in bf16. Inputs are strided views of one fused
projection, and bounds lie in [0.04, 0.94]. A shape is timed only if its output and every gradient agree with the
PyTorch form, which computes from the same inputs in fp32. Times are medians of CUDA events, in ms:

- in a row: forward and backward of eight operators, divided by eight. Each operator takes the output of the previous
  one as v, like the layers of a model. Autograd starts its thread only once for all eight.
- in a graph: forward and backward, replayed from a CUDA graph without the host.

"HGRN2" computes the states between chunks again in the backward. "HGRN2, states kept" keeps them, as the mixer does.
fla (fla-core) is timed if it can be imported, and only on the shapes of --fla, because its autotuning takes minutes.
--sweeps adds time against length and against heads.
"""

import argparse
import importlib.util
import sys

import pictures
import report
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hgrn2_kernels import chunk_hgrn2, chunk_hgrn2_pytorch, dispatch, step_hgrn2

D, ROW = 128, 8
CEILING = {"o": 3e-3, "dq": 4e-3, "df": 4e-3, "dv": 3e-3, "dlower_bound": 4e-3}
SHAPES = ["8x4096x16", "1x32768x16", "1x32768x4", "8x2048x8"]
SWEEPS = {
    "length, at 32768 tokens of 16 heads": [f"{32768 // T}x{T}x16" for T in (1024, 2048, 4096, 8192, 16384, 32768)],
    "heads, at one sequence of 32768": [f"1x32768x{H}" for H in (2, 4, 8, 16, 32)],
}
# Name -> factor and shift of the raw gate, which is drawn from N(0, 1), and the kind of bounds. The fresh model has
# width 2048 and weights of deviation 0.02 after a norm. Each head stands for another layer, and the first layer's bound
# is 0.
GATES = {
    "ordinary": (1, 0, "uniform"),
    "fresh model": (0.02 * 2048**0.5, 0, "layers"),
    "trained model": (1, 0, "uniform"),
    "x16, half the bounds 0": (16, 0, "half zero"),
    "all closed": (1, -30, "half zero"),
}
# The gates of a trained model, one line per layer, as benchmarks/gates.py measured them
# (docs/evidence/2026-11-25-gates.md): mean of the raw gate, deviation of the channels' means, mean deviation within a
# channel, and bound. Each head takes the gates of another layer.
TRAINED = [
    (0.45, 2.35, 4.00, 0.000),
    (1.20, 3.11, 3.48, 0.082),
    (2.17, 2.89, 3.23, 0.164),
    (1.71, 3.12, 3.12, 0.246),
    (1.50, 3.46, 2.94, 0.329),
    (1.65, 3.46, 3.07, 0.412),
    (0.03, 3.08, 2.75, 0.496),
    (-0.09, 2.69, 2.85, 0.579),
    (0.41, 2.53, 2.71, 0.664),
    (-0.01, 2.33, 2.42, 0.748),
    (0.00, 2.91, 1.98, 0.832),
    (-0.11, 2.92, 1.87, 0.916),
]


def milliseconds(function) -> float:
    """Return the median time of a call in ms."""
    from triton.testing import do_bench

    return do_bench(function, warmup=20, rep=100, return_mode="median")


def time_in_graph(function) -> float:
    """Capture a call in a CUDA graph, and return the median time of a replay in ms."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return milliseconds(graph.replay)


def make_inputs(B: int, T: int, H: int, gate: str = "ordinary") -> tuple[list[Tensor], Tensor]:
    """Return the leaves q, f, v (views of one projection [B, T, H, 3, D]) and the bound, and the gradient of o."""
    torch.manual_seed(0)
    scale, shift, bounds = GATES[gate]
    fused = torch.randn(B, T, H, 3, D, device="cuda", dtype=torch.bfloat16)
    fused[..., 1, :].mul_(scale).add_(shift)
    bound = torch.rand(H, D, device="cuda") * 0.9 + 0.04
    if bounds == "half zero":
        bound[:, ::2] = 0
    if gate == "trained model":
        layers = torch.tensor(TRAINED, device="cuda")[torch.arange(H) * len(TRAINED) // H]
        mean, spread, deviation, layer_bound = layers[:, None].unbind(-1)
        fused[..., 1, :].mul_(deviation).add_(mean + spread * torch.randn(H, D, device="cuda"))
        bound = layer_bound.repeat(1, D)
    if bounds == "layers":
        bound = (torch.arange(H, device="cuda") / H)[:, None].repeat(1, D)
    leaves = [x.detach().requires_grad_() for x in (*fused.unbind(3), bound)]
    return leaves, torch.randn(B, T, H, D, device="cuda", dtype=torch.bfloat16)


def hgrn2(q: Tensor, f: Tensor, v: Tensor, bound: Tensor, save_states: bool = False) -> Tensor:
    """Return o of the operator. By default its backward computes the states again."""
    return chunk_hgrn2(q, f, v, bound, save_states=save_states)[0]


def hgrn2_saved(q: Tensor, f: Tensor, v: Tensor, bound: Tensor) -> Tensor:
    """Return o of the operator that keeps its states for the backward."""
    return hgrn2(q, f, v, bound, save_states=True)


def fla_hgrn2(q: Tensor, f: Tensor, v: Tensor, bound: Tensor) -> Tensor:
    """Return o of the operator as fla's HGRN2Attention runs it (fla-core 0.6.0, fla/layers/hgrn2.py)."""
    from fla.modules.activations import swish
    from fla.ops.gla import chunk_gla

    g = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(f))
    k = 1 - g.exp()
    return chunk_gla(q=swish(q), k=k.to(v), v=v, g=g, state_v_first=True)[0]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the output of causal attention on cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def check(leaves: list[Tensor], do: Tensor):
    """Stop the program unless the output and every gradient agree with the PyTorch form in fp32."""
    own = [x.detach().requires_grad_() for x in leaves]
    o = hgrn2(*own)
    o.backward(do)
    got = dict(zip(CEILING, (o.detach(), *(x.grad for x in own)), strict=True))
    *wide, bound = leaves
    parts, dbound = [], torch.zeros_like(bound)
    heads = max(1, 2**17 // wide[0].shape[1])
    for b in range(len(do)):
        for h in range(0, do.shape[2], heads):
            rows = (slice(b, b + 1), slice(None), slice(h, h + heads))
            some = [x.detach()[rows].float().requires_grad_() for x in wide]
            some_bound = bound.detach()[h : h + heads].requires_grad_()
            o = chunk_hgrn2_pytorch(*some, some_bound)[0]
            o.backward(do[rows].float())
            dbound[h : h + heads] += some_bound.grad
            want = (o.detach(), *(x.grad for x in some))
            parts.append([(y, got[name][rows]) for name, y in zip(CEILING, want, strict=False)])
    pairs = {name: [p[n] for p in parts] for n, name in enumerate(list(CEILING)[:4])}
    keep = bound.detach() >= 1e-3
    pairs["dlower_bound"] = [(dbound[keep], got["dlower_bound"][keep])]
    for name, ceiling in CEILING.items():
        off = sum(((y - x.float()) ** 2).sum().double() for y, x in pairs[name])
        error = (off / sum((y**2).sum().double() for y, _ in pairs[name])).sqrt().item()
        if not error <= ceiling:
            raise SystemExit(
                f"{name} is wrong: its relative error is {error:.1e}, and {ceiling:.0e} is allowed, so nothing is timed"
            )


def times(op, leaves: list[Tensor], do: Tensor) -> tuple[float, float, float, float]:
    """Return median ms of a forward, and of forward and backward: once, ROW in a row (per operator), and in a graph."""

    def both(count: int = 1):
        for x in leaves:
            x.grad = None
        q, f, o, *rest = leaves
        for _ in range(count):
            o = op(q, f, o, *rest)
        o.backward(do)

    with torch.no_grad():
        forward = milliseconds(lambda: op(*leaves))
    return forward, milliseconds(both), milliseconds(lambda: both(ROW)) / ROW, time_in_graph(both)


def memory(op, leaves: list[Tensor], do: Tensor) -> tuple[float, float]:
    """Return the MiB kept for the backward without the output, and the peak MiB of both passes without the inputs."""
    for x in leaves:
        x.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o = op(*leaves)
    kept = torch.cuda.memory_allocated() - before - o.untyped_storage().nbytes()
    o.backward(do)
    return kept / 2**20, (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings() -> tuple[float, float]:
    """Measure this GPU: return the rate of a copy in TB/s, and of bf16 matrix products in TFLOP/s."""
    a = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    copy = 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e9
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / milliseconds(lambda: x @ y) / 1e9


def least(B: int, T: int, H: int) -> tuple[float, float]:
    """Return the least GB that forward and backward can move, and the GFLOP of their products with chunks of 64."""
    tokens = B * T * H
    # q, f, v, o; then q, f, v, do, dq, df, dv
    gigabytes = tokens * D * 2 * (4 + 7) / 1e9
    # forward: scores, scores v, q h, k v; backward twice as many, and the states again
    forward = 2 * tokens * (2 * 64 * D + 2 * D * D)
    return gigabytes, (3 * forward + 2 * tokens * D * D) / 1e9


def measure(shape: str, gate: str, peers: dict) -> dict:
    """Return times and memory of every operator at a shape, with the shares of bands of its gates."""
    B, T, H = map(int, shape.split("x"))
    leaves, do = make_inputs(B, T, H, gate)
    check(leaves, do)
    row = {"shape": shape, "gate": gate, "bands": bands(*leaves), "operators": {}}
    for name, op in ({"HGRN2": hgrn2, "HGRN2, states kept": hgrn2_saved} | peers).items():
        if op is attention:
            leaves = [torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"]
            do = torch.randn_like(leaves[0])
        op(*leaves).backward(do)
        row["operators"][name] = [*times(op, leaves, do), *memory(op, leaves, do)]
    return row


def bands(q: Tensor, f: Tensor, v: Tensor, bound: Tensor) -> list[float]:
    """Return the shares of (chunk, block of channels) that take 2, 3 and 4 bands, and the exact form."""
    *_, number = torch.ops.hgrn2.chunk(*(x.detach() for x in (q, f, v, bound)), None, None, 1.0, True, True)
    return [(number == n).float().mean().item() for n in (2, 3, 4, 5)]


HEAD = """\
| shape | gates | bands | operator | fwd | fwd + bwd | in a row | in a graph | times HGRN2's | kept MiB | peak MiB |
|---|---|---|---|---|---|---|---|---|---|---|"""


def lines(row: dict) -> str:
    """Return the lines of the table for one shape and gate."""
    first = f"| {row['shape']} | {row['gate']} | {' '.join(f'{x:.0%}' for x in row['bands'])} |"
    own = row["operators"]["HGRN2"]
    return "\n".join(
        " | ".join(
            [f"{first} {name}", *(f"{x:.3f}" for x in ms)]
            + [" ".join(f"{x / y:.2f}" for x, y in zip(ms, own, strict=False)), f"{kept:.0f}", f"{peak:.0f} |"]
        )
        for name, (*ms, kept, peak) in row["operators"].items()
    )


def measure_all(cases) -> list[dict]:
    """Measure cases of (shape, gate, peers), and print their lines as they come."""
    print(HEAD)
    rows = []
    for case in cases:
        rows.append(measure(*case))
        print(lines(rows[-1]), flush=True)
    return rows


def decode(N: int, H: int) -> tuple[float, float, float]:
    """Time step_hgrn2 on N sequences: return median ms, ms from a CUDA graph, and TB/s of states in the graph."""
    q, f, v = torch.randn(N, 1, H, 3, D, device="cuda", dtype=torch.bfloat16).unbind(3)
    bound, state = torch.rand(H, D, device="cuda"), torch.randn(N, H, D, D, device="cuda")

    def step():
        step_hgrn2(q, f, v, bound, state)

    in_graph = time_in_graph(step)
    return milliseconds(step), in_graph, 2 * state.nbytes / in_graph / 1e9


def flat(rows: list[dict]) -> list[dict]:
    """Return the rows for the file of results: one for each operator at a shape and gate."""
    columns = ["forward ms", "forward + backward ms", "in a row ms", "in a graph ms", "kept MiB", "peak MiB"]
    return [
        {"shape": row["shape"], "gates": row["gate"], "bands": row["bands"], "operator": name}
        | dict(zip(columns, values, strict=True))
        for row in rows
        for name, values in row["operators"].items()
    ]


def run(args):
    """Measure the shapes, the gates, the decoding step and the sweeps."""
    peers = {"attention": attention}
    with_fla = {"fla": fla_hgrn2} if importlib.util.find_spec("fla") else {}
    if not with_fla:
        print("fla cannot be imported, so it is not compared: pip install fla-core")
    copy, products = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy {copy:.2f} TB/s, bf16 {products:.0f} TFLOP/s"
    )
    cases = [(shape, "ordinary", (with_fla if shape in args.fla else {}) | peers) for shape in args.shapes]
    # the gates decide how many bands chunks are cut into; the time of the other operators does not depend on them
    cases += [(args.shapes[0], gate, {}) for gate in list(GATES)[1:]]
    rows = measure_all(cases)
    for shape in args.shapes:
        gigabytes, gigaflops = least(*map(int, shape.split("x")))
        print(
            f"{shape}: at least {gigabytes:.2f} GB, {gigabytes / copy:.2f} ms at the rate of the copy; "
            f"{gigaflops:.0f} GFLOP, {gigaflops / products:.2f} ms at the rate of the products"
        )
    ms, in_graph, rate = decode(64, 16)
    print(
        f"step_hgrn2, 64 sequences x 16 heads: {ms:.4f} ms, in a graph {in_graph:.4f} ms, {rate:.2f} TB/s, "
        f"{rate / copy:.0%} of the rate of the copy"
    )
    sweeps = {}
    for name, shapes in SWEEPS.items() if args.sweeps else ():
        print(f"\nTime against {name}")
        sweeps[name] = flat(measure_all([(shape, "ordinary", peers) for shape in shapes]))
    ceiling = {"copy TB/s": copy, "bf16 products TFLOP/s": products}
    step = {"ms": ms, "in a graph ms": in_graph, "TB/s": rate}
    report.write(args.out, flat(rows), ceilings=ceiling, step=step, sweeps=sweeps)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="shapes to time, as batch x length x heads")
    parser.add_argument("--fla", nargs="*", default=SHAPES[:2], help="shapes of --shapes on which fla is timed too")
    parser.add_argument("--any-gpu", action="store_true", help="run the kernels for every GPU, also on Hopper")
    parser.add_argument("--sweeps", action="store_true", help="also measure time against length and against heads")
    report.add_option(parser)
    parser.add_argument("--plot", nargs=2, metavar=("FILE.json", "PICTURE"), help="draw the sweeps of a results file")
    args = parser.parse_args()
    if args.plot:
        return pictures.of_operator(*args.plot)
    if not torch.cuda.is_available():
        sys.exit(
            "benchmarks/operator_times.py times kernels and needs a GPU, and this machine has none. Only --plot runs "
            "without."
        )
    dispatch.IN_USE = not args.any_gpu
    run(args)


if __name__ == "__main__":
    main()
