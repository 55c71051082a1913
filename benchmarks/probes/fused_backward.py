"""Time variants of a backward with fewer passes over the chunks, on one GPU. State gradients stay in registers.

    python benchmarks/probes/fused_backward.py [--only WORD ...] [--list]

There are three kinds of variants:

- A "path" is a forward and a backward, which consist of several kernels.
- A "walk" is a kernel that walks the chunks in reverse, reads the states of the forward, and writes dq and df. It also
  writes dv if one program holds all channels.
- A "pass" is a kernel of fused_forward.py or fused_gluon.py.

Every chunk is within the fast limit. "Today's" kernels are those of hgrn2_kernels/chunk_triton.py. The script compares
results with today's kernels, and those of the first batch row with autograd through the float64 recurrence, on the
inputs that it times. It prints a table, and writes the figures to $OUT/fused_backward.json if OUT is set.
"""

import argparse
import dataclasses
import json
import os
import time

import torch
import triton
import triton.language as tl
from fused_forward import (
    SEGMENTS,
    C,
    D,
    Problem,
    Variant,
    error,
    get,
    milliseconds,
    prefetch,
    put,
    rows,
    run_chosen,
    supervise,
    tell,
)
from triton.tools.tensor_descriptor import TensorDescriptor

from hgrn2_kernels import chunk_hgrn2
from hgrn2_kernels.chunk_triton import Launches, chunk_backward, chunk_forward
from hgrn2_kernels.inputs import Inputs
from hgrn2_kernels.reference import recurrent_hgrn2
from hgrn2_kernels.triton_math import (
    LOG2E,
    channels,
    column,
    dot,
    exp2,
    gate,
    load_matrix,
    reciprocal,
    rounded,
    sigmoid_parts,
    silu,
    sum_gates,
    sum_tokens,
)

# largest relative Frobenius errors of results, against the recurrence and against today's kernels
GOLD, TODAY = 4e-3, 5e-3


@triton.jit
def backward_kernel(
    q,  # [B T, H K] raw queries: a descriptor, as are all tensors up to df
    f,
    v,
    do,
    states,  # [chunks H K, V], the state entering each chunk, see frame in triton_math.py
    dstates,  # the same shape, the gradient of the state leaving each chunk; read where not CARRY
    dv,  # out where ALL
    dq,  # out
    df,  # out
    raw_q,  # pointers to the same tensors, for prefetching
    raw_f,
    raw_v,
    raw_do,
    raw_states,
    raw_dstates,
    bound,  # [H, K] fp32
    first,  # [segments, H, K, V] fp32, read where HAS_FIRST: gradient of the state after each segment
    dbound,  # [H, K, segments] fp32, out
    sums,
    ones,
    stride_qt,
    stride_qh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_gt,  # strides of dq and df
    stride_gh,
    inverse_scale,
    NT,  # chunks per segment
    SEGMENTS,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BK: tl.constexpr,
    DT: tl.constexpr,
    CARRY: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk the chunks of one segment and head in reverse, for BK channels of K.

    Formulas and roundings are the same as in the fast form of chunk_gradient, and in mode "mix" of fused_kernel in
    reverse.
    """
    NK: tl.constexpr = K // BK
    ALL: tl.constexpr = CARRY and BK == K
    pid = tl.program_id(0)
    i_k = pid % NK
    i_h = (pid // NK) % H
    i_s = pid // (NK * H)
    o_c = tl.arange(0, C)
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    o_kv = o_k[:, None] * V + o_v[None, :]
    eye = load_matrix(ones, 0, C).to(DT)
    again = tl.trans(eye)
    matrix = load_matrix(sums, 0, C)
    from_here = load_matrix(ones, 2, C)
    causal = o_c[:, None] >= o_c[None, :]
    b = tl.load(bound + i_h * K + o_k)
    dstate = tl.zeros([BK, V], tl.float32)
    if CARRY and HAS_FIRST:
        dstate = tl.load(first + (i_s.to(tl.int64) * H + i_h) * K * V + o_kv)
    db_sum = tl.zeros([BK], tl.float32)
    c_q = i_h * stride_qh + i_k * BK
    c_g = i_h * stride_gh + i_k * BK
    for step in tl.range(0, NT, num_stages=STAGES):
        chunk = i_s * NT + NT - 1 - step
        row = chunk * C
        place = (chunk * H + i_h) * K + i_k * BK
        b_f = get(f, row, c_q, 0, 0, True)
        b_q = get(q, row, c_q, 0, 0, True)
        b_do = get(do, row, i_h * stride_oh, 0, 0, True)
        b_v = get(v, row, i_h * stride_vh, 0, 0, True)
        b_h = get(states, place, 0, 0, 0, True)
        if not CARRY:
            b_dh = get(dstates, place, 0, 0, 0, True)
        if AHEAD > 0:
            if step + AHEAD < NT:
                later = (row - AHEAD * C).to(tl.int64)
                lines = tl.arange(0, 2)[None, :] * 64
                own = tl.arange(0, BK // 64)[None, :] * 64
                prefetch(raw_f + later * stride_qt + c_q + o_c[:, None] * stride_qt + own)
                prefetch(raw_q + later * stride_qt + c_q + o_c[:, None] * stride_qt + own)
                prefetch(raw_v + later * stride_vt + i_h * stride_vh + o_c[:, None] * stride_vt + lines)
                prefetch(raw_do + later * stride_ot + i_h * stride_oh + o_c[:, None] * stride_ot + lines)
                earlier = (place - AHEAD * H * K).to(tl.int64) * V + tl.arange(0, BK)[:, None] * V + lines
                prefetch(raw_states + earlier)
                if not CARRY:
                    prefetch(raw_dstates + earlier)
        g, k = gate(channels(b_f, eye), b[:, None], DT)
        decay = sum_gates(g, matrix, False)
        half = exp2(column(decay, C - 1))
        factor = exp2(decay)
        # rounded to DT, and kept in fp32 and in DT
        qf = rounded(silu(channels(b_q, eye), inverse_scale) * factor, DT)
        kf = rounded(k * exp2(-decay), DT)
        qd, kd = qf.to(DT), kf.to(DT)
        if CARRY:
            dstate = dstate * half[:, None]
            b_dh = dstate.to(DT)
        if ALL:
            out = dot(tl.trans(b_dh), kd, tl.zeros([V, C], tl.float32))
            scores = dot(tl.trans(qd), kd, tl.zeros([C, C], tl.float32))
            # entries on the other side of the diagonal may be infinite; they are replaced, and never multiplied by 0
            scores = tl.where(causal, scores, 0.0).to(DT)
            out = tl.trans(dot(tl.trans(b_do), scores, out))
            put(dv, row, i_h * stride_gh, 0, 0, out.to(DT), True)
        dscores = dot(b_do, tl.trans(b_v), tl.zeros([C, C], tl.float32))
        dscores = tl.where(causal, dscores, 0.0).to(DT)
        raw = dot(b_dh, tl.trans(b_v), tl.zeros([BK, C], tl.float32))
        # The sum of all writes. The balance, summed from a gate on, subtracts the writes after that gate.
        passing = tl.sum(kf * raw, 1)
        if CARRY:
            dstate = dot(qd, b_do, dstate) * half[:, None]
        raw = dot(qd, dscores, raw)
        k_dk = kf * raw
        raw = dot(b_h, tl.trans(b_do), tl.zeros([BK, C], tl.float32))
        raw = dot(kd, tl.trans(dscores), raw)
        balance = qf * raw - k_dk
        dq_sum = raw * factor
        # another copy of the identity, so that the compiler does not keep the earlier results in registers
        x_q = channels(b_q, again)
        s = reciprocal(inverse_scale + inverse_scale * exp2(-x_q * LOG2E))
        b_dq = dq_sum * s * (1.0 + x_q * (1.0 - s * inverse_scale))
        put(dq, row, c_g, 0, 0, tl.trans(b_dq.to(DT)), True)
        # This product reads the states from shared memory. Computed earlier, it would occupy registers for a long time.
        corner = dot(b_h, tl.trans(b_dh), tl.zeros([BK, BK], tl.float32))
        corner = tl.where(tl.arange(0, BK)[:, None] == tl.arange(0, BK)[None, :], corner, 0.0)
        passing += tl.sum(corner, 1)
        dg = sum_tokens(balance, from_here) + passing[:, None]
        e, r = sigmoid_parts(channels(b_f, again))
        k = (1.0 - b[:, None]) * r
        share = reciprocal(b[:, None] + e)
        b_df = k * (dg * (e * share)) - k_dk * (e * r)
        put(df, row, c_g, 0, 0, tl.trans(b_df.to(DT)), True)
        db_sum += tl.sum(dg * share - k_dk * reciprocal(1.0 - b)[:, None], 1)
    tl.store(dbound + (i_h * K + o_k) * SEGMENTS + i_s, tl.where(b > 0, db_sum, 0.0))


@dataclasses.dataclass(frozen=True)
class Walk:
    """A way to compile backward_kernel.

    Attributes:
        name: name in the table.
        predicted: predicted time in microseconds, written down before the first run.
        warps: warps of a program.
        BK: channels of K per program.
        carry: whether the kernel computes the gradient of the state itself. If not, it reads the gradients that the
            mirrored kernel stored.
        stages, ahead: constants of the kernel.
        regs: registers per thread of the warps that compute gates, in the kernel of fused_gluon_backward.py. 0 means
            the kernel of this file.
        shape: a key of SHAPES.
    """

    name: str
    predicted: int
    warps: int = 8
    BK: int = D
    carry: bool = True
    stages: int = 1
    ahead: int = 1
    regs: int = 0
    shape: str = "8x4096x16"


@dataclasses.dataclass(frozen=True)
class Path:
    """A forward and a backward. If sequences are cut, they include the passes that find the states before segments.

    Attributes:
        name, shape: as in Walk.
        predicted: predicted time of all kernels in a CUDA graph, in microseconds.
        check: whether the forward and the mirrored kernel count the bands of chunks beyond the fast limit.
        regs: `regs` of the Variant for the forward and for the mirrored kernel.
        backward_regs: `regs` of the Walk, if the backward is one kernel. 0 means that the backward is the mirrored
            kernel and today's chunk_gradient.
    """

    name: str
    predicted: int
    check: bool = False
    regs: int = 0
    backward_regs: int = 0
    shape: str = "8x4096x16"


TRITON = dict(stages=2, ahead=2, states=True, htma=True)
GATES, GATES_BACKWARD = 96, 104
BOTH = dict(regs=GATES, backward_regs=GATES_BACKWARD)
VARIANTS = [
    Path("path of three kernels, Triton", 1490),
    Path("path of three kernels, Triton, bands", 1510, check=True),
    Variant("pass, Triton, bands", 405, check=True, **TRITON),
    Walk("walk of all, Triton: dv, dq, df", 1300),
    Walk("walk of halves, Triton: dq, df", 1200, 4, 64),
    Walk("stored, halves, Triton: dq, df", 850, 4, 64, carry=False),
    Variant("pass, Gluon", 290, states=True, regs=GATES),
    Variant("pass, Gluon, no states", 240, regs=GATES),
    Variant("pass, Gluon, bands", 295, states=True, check=True, regs=GATES),
    Variant("pass, Gluon, mirrored", 290, states=True, reverse=True, regs=GATES),
    Path("path of three kernels, Gluon, bands", 1330, True, GATES),
    Walk("walk of all, Gluon: dv, dq, df", 560, regs=GATES_BACKWARD),
    Path("path of two kernels, Gluon", 850, **BOTH),
    Path("path of three kernels, Triton, bands, 1x32768x16", 1800, True, shape="1x32768x16"),
    Path("path of three kernels, Gluon, bands, 1x32768x16", 1620, True, GATES, shape="1x32768x16"),
    Path("path of two kernels, Gluon, 1x32768x16", 1150, **BOTH, shape="1x32768x16"),
    Path("path of three kernels, Triton, bands, 8x2048x8", 430, True, shape="8x2048x8"),
    Path("path of three kernels, Gluon, bands, 8x2048x8", 390, True, GATES, shape="8x2048x8"),
    Path("path of two kernels, Gluon, 8x2048x8", 290, **BOTH, shape="8x2048x8"),
    Path("path of three kernels, Triton, bands, 1x32768x4", 520, True, shape="1x32768x4"),
    Path("path of three kernels, Gluon, bands, 1x32768x4", 470, True, GATES, shape="1x32768x4"),
    Path("path of two kernels, Gluon, 1x32768x4", 340, **BOTH, shape="1x32768x4"),
]


def in_graph(function) -> float:
    """Capture a call in a CUDA graph, and return the milliseconds of a replay."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return milliseconds(graph.replay)


def walk_launch(problem: Problem, walk: Walk, states, dstates, out: dict):
    """Return a function that launches a walk, which fills dv, dq, df and dbound of `out`."""
    if walk.regs:
        import fused_gluon_backward

        return fused_gluon_backward.launch(problem, walk.regs, states, out)
    p, H = problem, problem.H
    q, f, v, do = p.q, p.f, p.v, p.do
    first = p.first[True]
    wide = lambda x: rows(x, D)  # noqa: E731
    narrow = lambda x: rows(x, walk.BK)  # noqa: E731
    flat = lambda x: TensorDescriptor(x, [x.numel() // D, D], [D, 1], [walk.BK, D])  # noqa: E731
    arguments = (
        *(narrow(q), narrow(f), wide(v), wide(do), flat(states), flat(dstates)),
        *(wide(out["dv"]), narrow(out["dq"]), narrow(out["df"])),
        *(q, f, v, do, states, dstates),
        *(p.bound, p.bound if first is None else first, out["dbound"], p.sums, p.ones),
        *(q.stride(1), q.stride(2), v.stride(1), v.stride(2), do.stride(1), do.stride(2)),
        *(out["dq"].stride(1), out["dq"].stride(2), D**0.5, p.length, p.segments),
    )
    constants = dict(
        H=H,
        K=D,
        V=D,
        C=C,
        BK=walk.BK,
        DT=tl.float32 if p.dtype == torch.float32 else tl.bfloat16,
        CARRY=walk.carry,
        HAS_FIRST=first is not None,
        AHEAD=walk.ahead,
        STAGES=walk.stages,
        num_warps=walk.warps,
    )
    grid = (p.segments * H * (D // walk.BK),)
    return lambda: backward_kernel[grid](*arguments, **constants)


def gold_gradients(p: Problem) -> dict | None:
    """Return the results of the first batch row in float64, or None if they would not fit into memory."""
    if p.T * p.H > 32768 * 4 or p.q.is_meta:
        return None
    with torch.enable_grad():
        inputs = [x[:1].double().requires_grad_() for x in (p.q, p.f, p.v)]
        bound = p.bound.double().requires_grad_()
        o = recurrent_hgrn2(*inputs, bound)[0]
        dq, df, dv, db = torch.autograd.grad(o, [*inputs, bound], p.do[:1].double())
    # the gradient of the bound is a sum over all rows, so one row gives it only for a batch of 1
    return dict(o=o.detach(), dq=dq, df=df, dv=dv, **(dict(dbound=db[None]) if p.B == 1 else {}))


class Bench:
    """The measurements of the variants. It makes inputs and reference results when a shape first needs them.

    It passes each row of results to `say`.
    """

    def __init__(self, say):
        self.say = say
        self.known = {}

    def problem(self, shape: str) -> dict:
        if shape not in self.known:
            self.known.clear()
            p = Problem(shape)
            q, f, v, do, bound = p.q, p.f, p.v, p.do, p.bound
            run = Launches(q, f, v, bound, D**-0.5, None)
            states, _, _ = run.states(v, None, wants_final=False)
            if not (run.bands == 1).all():
                raise SystemExit(
                    "a chunk is beyond the fast limit, but these probes have only the fast form: weaken the gates"
                )
            dstates, _, _ = run.states(do, None, reverse=True, wants_final=False)
            today = {name: torch.empty_like(do) for name in ("o", "dq", "df", "dv")}
            run.output(v, states, today["o"])
            run.output(do, dstates, today["dv"], reverse=True)
            today["dbound"] = run.gradients(v, do, states, dstates, today["dq"], today["df"])

            def everything(kept=True):
                inputs = Inputs(q, f, v, bound, None, None, D**-0.5)
                saved = chunk_forward(inputs, False, kept)[2]
                chunk_backward(do, None, inputs, saved)

            measured = dict(
                forward=milliseconds(lambda: chunk_hgrn2(q, f, v, bound, save_states=True)),
                gradient=milliseconds(lambda: run.gradients(v, do, states, dstates, today["dq"], today["df"])),
                everything=milliseconds(everything),
            )
            measured["forward in a graph"] = in_graph(lambda: chunk_hgrn2(q, f, v, bound, save_states=True))
            measured["everything in a graph"] = in_graph(everything)
            begun = time.time()
            gold = gold_gradients(p)
            row = dict(name=f"today's, {shape}", shape=shape, measured=measured)
            row["gold s"] = time.time() - begun
            self.say(row | self.errors(today, today, gold))
            before = None
            if SEGMENTS[shape] > 1:
                before = p.cut(run, SEGMENTS[shape])
                p.first = {False: before(v, False), True: before(do, True)}
            self.known[shape] = dict(p=p, states=states, dstates=dstates, today=today, gold=gold, before=before)
        return self.known[shape]

    @staticmethod
    def errors(got: dict, today: dict, gold: dict | None) -> dict:
        found = dict(
            today={name: error(got[name], x) for name, x in today.items() if name in got and x is not got[name]}
        )
        if gold is not None:
            found["gold"] = {
                name: error(got[name][None] if name == "dbound" else got[name][:1], x)
                for name, x in gold.items()
                if name in got
            }
        return found

    def variant(self, variant):
        known = self.problem(variant.shape)
        row = dict(name=variant.name, shape=variant.shape, predicted=variant.predicted)
        {Path: self.path, Walk: self.walk, Variant: self.one_pass}[type(variant)](variant, known, row)

    def one_pass(self, variant: Variant, known: dict, row: dict):
        p, name = known["p"], "dv" if variant.reverse else "o"
        o, states = p.outputs()
        launch = p.launch(variant, o, states)
        begun = time.time()
        row.update(numbers(launch()))
        torch.cuda.synchronize()
        row["first call s"] = time.time() - begun
        got = {name: o}
        today = dict(known["today"])
        if variant.states:
            got["states"], today["states"] = states, known["dstates" if variant.reverse else "states"]
        row.update(self.errors(got, today, known["gold"]))
        again = o.clone()
        o.fill_(torch.nan)
        launch()
        row["same bits"] = torch.equal(again, o)
        row["ms"] = ms = milliseconds(launch)
        row["GB/s"] = p.do.nbytes * (4 + (2 if variant.states else 0)) / ms / 1e6
        self.say(row)

    def walk(self, walk: Walk, known: dict, row: dict):
        p = known["p"]
        every = walk.carry and walk.BK == D
        out = {name: torch.full_like(p.do, torch.nan) for name in ("dv", "dq", "df")}
        out["dbound"] = p.bound.new_full((p.H, D, p.segments), torch.nan)
        launch = walk_launch(p, walk, known["states"], known["dstates"], out)
        begun = time.time()
        compiled = launch()
        torch.cuda.synchronize()
        row["first call s"] = time.time() - begun
        row.update(numbers(compiled))
        if not every:
            out.pop("dv")

        def results():
            return {name: x.sum(-1) if name == "dbound" else x.clone() for name, x in out.items()}

        got = results()
        row.update(self.errors(got, known["today"], known["gold"]))
        for x in out.values():
            x.fill_(torch.nan)
        launch()
        row["same bits"] = all(torch.equal(x, got[name]) for name, x in results().items())
        row["ms"] = ms = milliseconds(launch)
        tiles = 4 + 2 + (1 if every else 0) + 2 + (0 if walk.carry else 2)
        row["GB/s"] = p.do.nbytes * tiles / ms / 1e6
        self.say(row)

    def path(self, path: Path, known: dict, row: dict):
        p, before = known["p"], known["before"]
        plain = dict(predicted=0, **TRITON, check=path.check, regs=path.regs)
        o, states = p.outputs()
        dv, dstates = p.outputs()
        dq, df = torch.full_like(o, torch.nan), torch.full_like(o, torch.nan)
        run = Launches(p.q, p.f, p.v, p.bound, D**-0.5, None)
        # A copy of the plan gets launches of its own. The cached launches are bound to bands of another dtype.
        run.plan = dataclasses.replace(run.plan)
        run.bands = p.bands if path.check else torch.ones_like(p.bands, dtype=torch.int8)
        forward_launch = p.launch(Variant("", **plain), o, states)
        kernels = dict(forward=forward_launch)
        if path.backward_regs:
            out = dict(dv=dv, dq=dq, df=df, dbound=p.bound.new_empty(p.H, D, p.segments))
            backward_launch = walk_launch(p, Walk("", 0, regs=path.backward_regs), states, dstates, out)
            kernels["backward"] = backward_launch

            def gradient():
                return out["dbound"].sum(-1)
        else:
            backward_launch = p.launch(Variant("", reverse=True, **plain), dv, dstates)
            kernels["mirrored"] = backward_launch

            def gradient():
                return run.gradients(p.v, p.do, states, dstates, dq, df)

            kernels["gradient"] = gradient

        def forward():
            if path.check:
                p.bands.fill_(1)
            if before:
                before(p.v, False, p.first[False])
            forward_launch()

        def backward():
            if before:
                before(p.do, True, p.first[True])
            backward_launch()
            return gradient()

        begun = time.time()
        row["forward kernel"], row["backward kernel"] = numbers(forward_launch()), numbers(backward_launch())
        forward()
        got = dict(o=o, dq=dq, df=df, dv=dv, dbound=backward())
        torch.cuda.synchronize()
        row["first call s"] = time.time() - begun
        row.update(self.errors(got, known["today"], known["gold"]))
        got = {name: x.clone() for name, x in got.items()}
        for x in (o, dq, df, dv):
            x.fill_(torch.nan)
        forward()
        again = dict(o=o, dq=dq, df=df, dv=dv, dbound=backward())
        row["same bits"] = all(torch.equal(x, again[name]) for name, x in got.items())
        if path.check and not p.q.is_meta:
            row["beyond"] = (p.bands != 1).sum().item()
        measured = row["measured"] = {name: milliseconds(kernel) for name, kernel in kernels.items()}
        if before:
            measured["before"] = milliseconds(lambda: before(p.v, False))
            measured["before, reversed"] = milliseconds(lambda: before(p.do, True))
        measured["forward in a graph"] = in_graph(forward)
        row["ms"] = measured["everything in a graph"] = in_graph(lambda: (forward(), backward()))
        self.say(row)


def numbers(compiled) -> dict:
    if isinstance(compiled, triton.compiler.CompiledKernel):
        return dict(n_regs=compiled.n_regs, n_spills=compiled.n_spills, shared=compiled.metadata.shared)
    return {}


def table(found: list[dict]) -> str:
    lines = [
        "| variant | predicted us | measured us | regs, spills, shared | errors beside today's | errors |",
        "|---" * 6 + "|",
    ]
    for row in found:
        if "failed" in row:
            lines.append(f"| {row['name']} | failed: {' '.join(row['failed'])[-200:]} |")
            continue
        if "rate" in row:
            lines.append(f"| copy on {row['device']}: {row['rate']:.0f} GB/s |")
            continue
        kernels = [row, row.get("forward kernel", {}), row.get("backward kernel", {})]
        kernels = "; ".join(f"{x['n_regs']} {x['n_spills']} {x['shared']}" for x in kernels if "n_regs" in x)
        times = f"{1e3 * row['ms']:.0f}" if "ms" in row else ""
        if "measured" in row:
            times += " (" + ", ".join(f"{name} {1e3 * ms:.0f}" for name, ms in row["measured"].items()) + ")"
        errors = [row.get("today", {}), row.get("gold", {})]
        bad = any(not x <= most for e, most in zip(errors, (TODAY, GOLD), strict=True) for x in e.values())
        times += (" WRONG" if bad else "") + ("" if row.get("same bits", True) else " NOT THE SAME BITS TWICE")
        errors = [" ".join(f"{name} {x:.1e}" for name, x in e.items()) for e in errors]
        lines.append(
            f"| {row['name']} | {row.get('predicted', '')} | {times} | {kernels} | {errors[0]} | {errors[1]} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[], help="run only variants whose name has one of these words")
    parser.add_argument("--list", action="store_true", help="print the variants and exit")
    parser.add_argument("--worker", type=int, help="run in this process, starting with the variant of this number")
    args = parser.parse_args()
    chosen = [x for x in VARIANTS if not args.only or any(word in x.name for word in args.only)]
    if args.list:
        return print(*chosen, sep="\n")
    if args.worker is not None:
        return run_chosen(args.worker, chosen, tell, Bench(tell).variant)
    found = supervise(args.only, chosen, __file__)
    if os.environ.get("OUT"):
        with open(os.path.join(os.environ["OUT"], "fused_backward.json"), "w") as file:
            json.dump(found, file, indent=1)
    print(table(found))


if __name__ == "__main__":
    main()
