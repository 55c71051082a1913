"""Time variants of a forward that walks the chunks once on one GPU. It keeps the state in registers and writes o.

    python benchmarks/probes/fused_forward.py [--only WORD ...] [--list]

Each variant is a kernel for bf16, heads of 128 channels and chunks within the fast limit. The script stops if a chunk
is beyond the limit. "Today's" kernels are those of hgrn2_kernels/chunk_triton.py. The script compares the results of
each variant with the float64 recurrence and with today's kernels, and times the variant and today's kernels on the same
inputs. Variants run in a child process. If a variant fails or hangs, a new child continues with the next one. The
script prints a table, and writes the figures to $OUT/fused_forward.json if OUT is set.
"""

import argparse
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from hgrn2_kernels import chunk_hgrn2
from hgrn2_kernels.chunk_plan import Segments
from hgrn2_kernels.chunk_triton import Launches
from hgrn2_kernels.matrices import matrices
from hgrn2_kernels.reference import recurrent_hgrn2
from hgrn2_kernels.triton_math import (
    BANDS,
    INTERPRET,
    LIMIT,
    LOG2E,
    channels,
    column,
    dot,
    exp2,
    gate,
    load_matrix,
    log2,
    reciprocal,
    silu,
    sum_gates,
    whole_matrix,
)

D, C = 128, 64
SHAPES = {
    "8x4096x16": (8, 4096, 16),
    "1x32768x16": (1, 32768, 16),
    "1x32768x4": (1, 32768, 4),
    "8x2048x8": (8, 2048, 8),
}
# segments per sequence, such that the number of segments times heads is close to a multiple of 132
SEGMENTS = {"8x4096x16": 1, "1x32768x16": 8, "1x32768x4": 32, "8x2048x8": 2}
# largest relative Frobenius error: of o against the recurrence, and of dv against today's kernels. Both are in bf16.
CEILING = 3.5e-3
# A child that prints nothing for SECONDS is killed. No child is started later than LAST seconds after the start.
SECONDS, LAST = 45, 300


@triton.jit
def gates_one_reciprocal(x, q, b, inverse_scale):
    """Return (g, k, a) as gate and silu compute them, with one reciprocal for both and exponents of at most 60."""
    e = exp2(tl.minimum(tl.maximum(x * LOG2E, -125.0), 60.0))
    p = 1.0 + e
    s = inverse_scale + inverse_scale * exp2(tl.minimum(-q * LOG2E, 60.0))
    both = reciprocal(p * s)
    r = both * s
    k = (1.0 - b) * r
    series = k * (-LOG2E - k * (0.5 * LOG2E))
    return tl.where(k < 0.0078125, series, log2((b + e) * r)), k, q * (both * p)


@triton.jit
def operands(
    b_f, b_q, b, eye, matrix, inverse_scale, C: tl.constexpr, WHOLE: tl.constexpr, RCP: tl.constexpr, DT: tl.constexpr
):
    """Return queries and keys [channels, C] in the frame of the chunk's middle, and half of its decay [channels].

    Half of the decay has passed at the middle, so the exponent of the last token is this half.
    """
    if RCP:
        g, k, a = gates_one_reciprocal(channels(b_f, eye), channels(b_q, eye), b[:, None], inverse_scale)
    else:
        g, k = gate(channels(b_f, eye), b[:, None], DT)
    e = sum_gates(g, matrix, False)
    if WHOLE:
        half = exp2(0.5 * column(sum_gates(g, whole_matrix(C, DT), False), 0))
    else:
        half = exp2(column(e, C - 1))
    kd = (k * exp2(-e)).to(DT)
    if not RCP:
        a = silu(channels(b_q, eye), inverse_scale)
    qd = (a * exp2(e)).to(DT)
    return qd, kd, half


@triton.jit
def operands_checked(
    b_f, b_q, b, eye, matrix, inverse_scale, at_bands, C: tl.constexpr, REVERSE: tl.constexpr, DT: tl.constexpr
):
    """Return queries, keys, the decay to the frame, and the decay of each channel beyond the limit, for any gates.

    Writes to the state have exponents of at most the limit, so the state is correct even where the output is not. A
    channel beyond the limit raises the number of bands of its chunk, which 64 channels share. It does this by an atomic
    maximum, so no warp waits for another one.
    """
    g, k = gate(channels(b_f, eye), b[:, None], DT)
    e = sum_gates(g, matrix, False)
    middle = column(e, C - 1)
    framed = tl.maximum(middle, -LIMIT)
    beyond = middle - framed
    needed = ((1.5 - 2.0 * middle) * (0.5 / LIMIT)).to(tl.int32) + 1
    tl.atomic_max(at_bands, tl.minimum(needed, BANDS + 1), mask=needed > 1, sem="relaxed")
    kd = (k * exp2(-e if REVERSE else beyond[:, None] - e)).to(DT)
    a = silu(channels(b_q, eye), inverse_scale)
    qd = (a * exp2(e + beyond[:, None] if REVERSE else e)).to(DT)
    return qd, kd, exp2(framed), exp2(2.0 * beyond)


@triton.jit
def prefetch(at):
    if not INTERPRET:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def get(x, row, column, offsets, stride_t, TMA: tl.constexpr):
    if TMA:
        return x.load([row, column])
    else:
        return tl.load(x + row.to(tl.int64) * stride_t + column + offsets)


@triton.jit
def put(x, row, column, offsets, stride_t, value, TMA: tl.constexpr):
    if TMA:
        x.store([row, column], value)
    else:
        tl.store(x + row.to(tl.int64) * stride_t + column + offsets, value)


@triton.jit
def fused_kernel(
    q,  # [B T, H K] raw queries: a descriptor where LTMA, as are f and y
    f,
    y,  # v, or do where REVERSE
    raw_q,  # pointers to q, f and y, for prefetching
    raw_f,
    raw_y,
    bound,  # [H, K] fp32
    first,  # [segments, H, K, V] fp32, read where HAS_FIRST
    states,  # [chunks, H, K, V] bf16, out where STATES; a descriptor where HTMA
    bands,  # [chunks, H, K / 64] int32, filled with 1; out where CHECK: the number of bands that the chunk needs
    o,  # [B T, H V], out; a descriptor where OTMA
    sums,
    ones,
    stride_qt,
    stride_qh,
    stride_yt,
    stride_yh,
    stride_ot,
    stride_oh,
    inverse_scale,
    NT,  # chunks per segment
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    STATES: tl.constexpr,
    MODE: tl.constexpr,
    LTMA: tl.constexpr,
    OTMA: tl.constexpr,
    HTMA: tl.constexpr,
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    RCP: tl.constexpr,
    CHECK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Walk the chunks of one segment and head, for BV channels of V.

    MODE is the layout of the state, which is an operand of the product for o:

    - "kv": the state is [K, V] and the right operand.
    - "mix": the state is [K, V]. Its transpose is the left operand, and the product is o transposed.
    - "vk": the state is [V, K]. It is the left operand in the layout that it has in registers.
    """
    NV: tl.constexpr = V // BV
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_s = pid // (NV * H)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, K)
    o_v = tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    off_q = o_c[:, None] * stride_qt + o_k[None, :]
    off_y = o_c[:, None] * stride_yt + o_v[None, :]
    off_o = o_c[:, None] * stride_ot + o_v[None, :]
    eye = load_matrix(ones, 0, C).to(DT)
    matrix = load_matrix(sums, 0, C)
    # scores are [writer, reader], and a reader sees the writers up to itself
    seen = o_c[:, None] >= o_c[None, :] if REVERSE else o_c[:, None] <= o_c[None, :]
    b = tl.load(bound + i_h * K + o_k)
    VK: tl.constexpr = MODE == "vk"
    if VK:
        state = tl.zeros([BV, K], tl.float32)
    else:
        state = tl.zeros([K, BV], tl.float32)
    if HAS_FIRST:
        p_first = first + (i_s.to(tl.int64) * H + i_h) * K * V + i_v * BV
        state = tl.load(p_first + (tl.trans(o_kv) if VK else o_kv))
    c_q = i_h * stride_qh
    c_y = i_h * stride_yh + i_v * BV
    for step in tl.range(0, NT, num_stages=STAGES):
        chunk = i_s * NT + (NT - 1 - step if REVERSE else step)
        row = chunk * C
        b_f = get(f, row, c_q, off_q, stride_qt, LTMA)
        b_q = get(q, row, c_q, off_q, stride_qt, LTMA)
        b_y = get(y, row, c_y, off_y, stride_yt, LTMA)
        if AHEAD > 0:
            if step + AHEAD < NT:
                later = (row + (-AHEAD * C if REVERSE else AHEAD * C)).to(tl.int64)
                lines = tl.arange(0, 2)[None, :] * 64
                prefetch(raw_f + later * stride_qt + c_q + o_c[:, None] * stride_qt + lines)
                prefetch(raw_q + later * stride_qt + c_q + o_c[:, None] * stride_qt + lines)
                prefetch(raw_y + later * stride_yt + i_h * stride_yh + o_c[:, None] * stride_yt + lines)
        place = (chunk * H + i_h) * K
        if CHECK:
            at_bands = bands + (chunk * H + i_h) * (K // 64) + o_k // 64
            qd, kd, half, beyond = operands_checked(b_f, b_q, b, eye, matrix, inverse_scale, at_bands, C, REVERSE, DT)
        else:
            qd, kd, half = operands(b_f, b_q, b, eye, matrix, inverse_scale, C, WHOLE, RCP, DT)
        reader, writer = (kd, qd) if REVERSE else (qd, kd)
        if VK:
            state = state * half[None, :]
            b_h = state.to(DT)
            if STATES:
                put(states, place, i_v * BV, o_kv, V, tl.trans(b_h), HTMA)
            out = dot(b_h, reader, tl.zeros([BV, C], tl.float32))
            scores = dot(tl.trans(writer), reader, tl.zeros([C, C], tl.float32))
            # entries on the other side of the diagonal may be infinite; they are replaced, and never multiplied by 0
            scores = tl.where(seen, scores, 0.0).to(DT)
            out = tl.trans(dot(tl.trans(b_y), scores, out))
            if CHECK:
                state = state * beyond[None, :]
            state = dot(tl.trans(b_y), tl.trans(writer), state) * half[None, :]
        else:
            state = state * half[:, None]
            b_h = state.to(DT)
            if STATES:
                put(states, place, i_v * BV, o_kv, V, b_h, HTMA)
            if MODE == "kv":
                out = dot(tl.trans(reader), b_h, tl.zeros([C, BV], tl.float32))
                scores = dot(tl.trans(reader), writer, tl.zeros([C, C], tl.float32))
                scores = tl.where(tl.trans(seen), scores, 0.0).to(DT)
                out = dot(scores, b_y, out)
            else:
                out = dot(tl.trans(b_h), reader, tl.zeros([BV, C], tl.float32))
                scores = dot(tl.trans(writer), reader, tl.zeros([C, C], tl.float32))
                scores = tl.where(seen, scores, 0.0).to(DT)
                out = tl.trans(dot(tl.trans(b_y), scores, out))
            if CHECK:
                state = state * beyond[:, None]
            state = dot(writer, b_y, state) * half[:, None]
        put(o, row, i_h * stride_oh + i_v * BV, off_o, stride_ot, out.to(DT), OTMA)


@triton.jit
def half_block(
    b_f,
    b_q,
    b,
    state,
    out,
    scores,
    states,
    place,
    c_v,
    off_h,
    eye,
    matrix,
    inverse_scale,
    V: tl.constexpr,
    C: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    STATES: tl.constexpr,
    HTMA: tl.constexpr,
    WHOLE: tl.constexpr,
    RCP: tl.constexpr,
):
    qd, kd, half = operands(b_f, b_q, b, eye, matrix, inverse_scale, C, WHOLE, RCP, DT)
    reader, writer = (kd, qd) if REVERSE else (qd, kd)
    state = state * half[:, None]
    b_h = state.to(DT)
    if STATES:
        put(states, place, c_v, off_h, V, b_h, HTMA)
    out = dot(tl.trans(b_h), reader, out)
    scores = dot(tl.trans(writer), reader, scores)
    return state, out, scores, writer, half


@triton.jit
def fused_halves_kernel(
    q,
    f,
    y,
    raw_q,
    raw_f,
    raw_y,
    bound,
    first,
    states,
    bands,
    o,
    sums,
    ones,
    stride_qt,
    stride_qh,
    stride_yt,
    stride_yh,
    stride_ot,
    stride_oh,
    inverse_scale,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    STATES: tl.constexpr,
    LTMA: tl.constexpr,
    OTMA: tl.constexpr,
    HTMA: tl.constexpr,
    AHEAD: tl.constexpr,
    WHOLE: tl.constexpr,
    RCP: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the same as fused_kernel in mode "mix", with the channels of K in two halves.

    A program has four warps, and two programs run on each multiprocessor.
    """
    NV: tl.constexpr = V // BV
    BK: tl.constexpr = K // 2
    pid = tl.program_id(0)
    i_v = pid % NV
    i_h = (pid // NV) % H
    i_s = pid // (NV * H)
    o_c = tl.arange(0, C)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    o_kv = o_k[:, None] * V + o_v[None, :]
    off_q = o_c[:, None] * stride_qt + o_k[None, :]
    off_y = o_c[:, None] * stride_yt + o_v[None, :]
    off_o = o_c[:, None] * stride_ot + o_v[None, :]
    eye = load_matrix(ones, 0, C).to(DT)
    matrix = load_matrix(sums, 0, C)
    seen = o_c[:, None] >= o_c[None, :] if REVERSE else o_c[:, None] <= o_c[None, :]
    b0 = tl.load(bound + i_h * K + o_k)
    b1 = tl.load(bound + i_h * K + BK + o_k)
    s0 = tl.zeros([BK, BV], tl.float32)
    s1 = tl.zeros([BK, BV], tl.float32)
    if HAS_FIRST:
        p_first = first + (i_s.to(tl.int64) * H + i_h) * K * V + i_v * BV + o_kv
        s0 = tl.load(p_first)
        s1 = tl.load(p_first + BK * V)
    c_q = i_h * stride_qh
    c_y = i_h * stride_yh + i_v * BV
    for step in tl.range(0, NT, num_stages=STAGES):
        chunk = i_s * NT + (NT - 1 - step if REVERSE else step)
        row = chunk * C
        f0 = get(f, row, c_q, off_q, stride_qt, LTMA)
        q0 = get(q, row, c_q, off_q, stride_qt, LTMA)
        f1 = get(f, row, c_q + BK, off_q, stride_qt, LTMA)
        q1 = get(q, row, c_q + BK, off_q, stride_qt, LTMA)
        b_y = get(y, row, c_y, off_y, stride_yt, LTMA)
        if AHEAD > 0:
            if step + AHEAD < NT:
                later = (row + (-AHEAD * C if REVERSE else AHEAD * C)).to(tl.int64)
                lines = tl.arange(0, 2)[None, :] * 64
                line = tl.arange(0, 1)[None, :]
                prefetch(raw_f + later * stride_qt + c_q + o_c[:, None] * stride_qt + lines)
                prefetch(raw_q + later * stride_qt + c_q + o_c[:, None] * stride_qt + lines)
                prefetch(raw_y + later * stride_yt + c_y + o_c[:, None] * stride_yt + line)
        place = (chunk * H + i_h) * K
        out = tl.zeros([BV, C], tl.float32)
        scores = tl.zeros([C, C], tl.float32)
        # fmt: off
        s0, out, scores, w0, h0 = half_block(
            f0, q0, b0, s0, out, scores, states, place, i_v * BV, o_kv, eye, matrix, inverse_scale,
            V, C, DT, REVERSE, STATES, HTMA, WHOLE, RCP,
        )
        s0 = dot(w0, b_y, s0) * h0[:, None]
        s1, out, scores, w1, h1 = half_block(
            f1, q1, b1, s1, out, scores, states, place + BK, i_v * BV, o_kv, eye, matrix, inverse_scale,
            V, C, DT, REVERSE, STATES, HTMA, WHOLE, RCP,
        )
        # fmt: on
        s1 = dot(w1, b_y, s1) * h1[:, None]
        chosen = tl.where(seen, scores, 0.0).to(DT)
        out = tl.trans(dot(tl.trans(b_y), chosen, out))
        put(o, row, i_h * stride_oh + i_v * BV, off_o, stride_ot, out.to(DT), OTMA)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to compile and launch a probe.

    Attributes:
        name: name in the table.
        predicted: predicted time in microseconds at 8 x 4096 x 16, written down before the first run.
        warps: warps of a program.
        halves: whether to run fused_halves_kernel, with two programs of 64 channels of V for each (segment, head).
        mode, stages, ahead, states, whole, ltma, otma, htma, rcp, check: constants of the kernels.
        reverse: whether to run the mirrored kernel, which computes dv and the gradients of the states.
        regs: registers per thread of the warps that compute gates, in the kernel of fused_gluon.py. 0 means a kernel
            of this file.
        shape: a key of SHAPES.
    """

    name: str
    predicted: int
    warps: int = 8
    halves: bool = False
    mode: str = "vk"
    stages: int = 3
    ahead: int = 0
    states: bool = False
    ltma: bool = True
    otma: bool = True
    htma: bool = False
    rcp: bool = False
    check: bool = False
    whole: bool = False
    reverse: bool = False
    regs: int = 0
    shape: str = "8x4096x16"


LONG = "1x32768x16"
VARIANTS = [
    Variant("vk, 3 stages", 360),
    Variant("vk, 3 stages, states", 400, states=True),
    Variant("vk, 2 stages, L2 ahead", 370, stages=2, ahead=2),
    Variant("vk, 2 stages, L2 ahead, states by TMA", 400, stages=2, ahead=2, states=True, htma=True),
    Variant("mix, 3 stages", 365, mode="mix"),
    Variant("mix, 3 stages, states", 400, mode="mix", states=True),
    Variant("halves, 1 stage, L2 ahead", 330, 4, True, stages=1, ahead=2, otma=False),
    Variant("halves, 2 stages, L2 ahead", 310, 4, True, stages=2, ahead=2, otma=False),
    Variant("halves, 2 stages, L2 ahead, states", 350, 4, True, stages=2, ahead=2, otma=False, states=True),
    Variant("halves, 2 stages, L2 ahead, one reciprocal", 300, 4, True, stages=2, ahead=2, otma=False, rcp=True),
    Variant("halves, 1 stage, L2 ahead, states", 370, 4, True, stages=1, ahead=2, otma=False, states=True),
    Variant("vk, 3 stages, one reciprocal", 350, rcp=True),
    Variant("vk, 3 stages, pointers", 375, ltma=False, otma=False),
    Variant("kv, 2 stages", 480, mode="kv", stages=2),
    Variant("vk, 16 warps, 2 stages, L2 ahead", 430, 16, stages=2, ahead=2),
    Variant("mirrored vk, 3 stages", 360, reverse=True),
    Variant("mirrored halves, 2 stages, L2 ahead", 310, 4, True, stages=2, ahead=2, otma=False, reverse=True),
    Variant("vk, 3 stages, segments", 360, shape=LONG),
    Variant("halves, 2 stages, L2 ahead, segments", 310, 4, True, stages=2, ahead=2, otma=False, shape=LONG),
    # second round of variants
    Variant("vk, 2 stages, L2 ahead, states by TMA, bands", 402, stages=2, ahead=2, states=True, htma=True, check=True),
]


def rows(x, width):
    """Return a descriptor of tiles [C, width] of x [B, T, H, D] as a matrix [B T, H D]. Heads may lie apart."""
    assert x.stride(0) == x.shape[1] * x.stride(1) and x.stride(3) == 1
    shape = [x.shape[0] * x.shape[1], (x.shape[2] - 1) * x.stride(2) + D]
    return TensorDescriptor(x, shape, [x.stride(1), 1], [C, width])


class Problem:
    """The inputs of one shape, buffers for the outputs, and the launches of the variants."""

    def __init__(self, shape: str | tuple[int, int, int], device="cuda", dtype=torch.bfloat16):
        self.B, self.T, self.H = SHAPES[shape] if isinstance(shape, str) else shape
        torch.manual_seed(0)
        fused = torch.randn(self.B, self.T, self.H, 3, D, device=device, dtype=dtype)
        self.q, self.f, self.v = fused.unbind(3)
        self.bound = torch.rand(self.H, D, device=device) * 0.9 + 0.04
        self.do = torch.randn(self.B, self.T, self.H, D, device=device, dtype=dtype)
        self.sums, self.ones = matrices(self.q.device, C, dtype)
        self.dtype = dtype
        self.segments, self.length = self.B, self.T // C
        # the states that enter the segments; the keys are False for forward and True for reverse
        self.first = {False: None, True: None}
        self.bands = torch.ones(self.B * self.T // C, self.H, D // 64, device=device, dtype=torch.int32)

    def cut(self, run: Launches, per_sequence: int):
        """Cut each sequence into `per_sequence` segments.

        Returns:
            A function (y, reverse, into=None) that returns the states which enter the segments. It takes v and False,
            or do and True. It writes to the tensor `into`, or to a new one.
        """
        chunks = self.T // C
        plan = run.plan
        segments = Segments(self.B * per_sequence, chunks // per_sequence, per_sequence)
        run.plan = dataclasses.replace(plan, segments=segments)
        self.segments, self.length = segments.count, segments.length

        def before(y, reverse, into=None):
            added, decays = run._per_segment(y, D) if into is None else into, run._per_segment(y)
            run._walk(y, reverse, None, None, final=added, decays=decays)
            return run._scan(added, decays, None, None, reverse)[0]

        return before

    def outputs(self):
        """Return tensors for o [B, T, H, D] and the states [chunks, H, D, D], filled with NaN."""
        chunks = self.B * self.T // C
        o, states = torch.empty_like(self.do), self.do.new_empty(chunks, self.H, D, D)
        return o.fill_(torch.nan), states.fill_(torch.nan)

    def launch(self, variant: Variant, o, states):
        """Return a function that launches the variant and returns the compiled kernel."""
        if variant.regs:
            import fused_gluon

            return fused_gluon.launch(self, variant, o, states)
        y = self.do if variant.reverse else self.v
        BV = 64 if variant.halves else D
        BK = D // 2 if variant.halves else D
        H = self.H
        first = self.first[variant.reverse]
        flat = states.view(-1, D)
        loads = (rows(self.q, BK), rows(self.f, BK), rows(y, BV)) if variant.ltma else (self.q, self.f, y)
        kernel = fused_halves_kernel if variant.halves else fused_kernel
        arguments = (
            *loads,
            *(self.q, self.f, y, self.bound, self.bound if first is None else first),
            TensorDescriptor(flat, list(flat.shape), [D, 1], [BK, BV]) if variant.htma else states,
            self.bands,
            rows(o, BV) if variant.otma else o,
            *(self.sums, self.ones),
            *(self.q.stride(1), self.q.stride(2), y.stride(1), y.stride(2), o.stride(1), o.stride(2)),
            D**0.5,
            self.length,
        )
        constants = dict(
            H=H,
            K=D,
            V=D,
            C=C,
            BV=BV,
            DT=tl.float32 if self.dtype == torch.float32 else tl.bfloat16,
            REVERSE=variant.reverse,
            HAS_FIRST=first is not None,
            STATES=variant.states,
            LTMA=variant.ltma,
            OTMA=variant.otma,
            HTMA=variant.htma,
            AHEAD=variant.ahead,
            WHOLE=variant.whole,
            RCP=variant.rcp,
            STAGES=variant.stages,
            num_warps=variant.warps,
        )
        if not variant.halves:
            constants.update(MODE=variant.mode, CHECK=variant.check)
        grid = (self.segments * H * (D // BV),)
        return lambda: kernel[grid](*arguments, **constants)


def error(got, want) -> float:
    """Return the relative Frobenius error, computed one batch row at a time to save memory."""
    off = sum(((x.double() - y.double()) ** 2).sum() for x, y in zip(got, want, strict=True))
    return (off / sum((y.double() ** 2).sum() for y in want)).sqrt().item()


def milliseconds(function) -> float:
    return triton.testing.do_bench(function, warmup=20, rep=100, return_mode="median")


def attention_ms(B, T, H) -> float:
    q, k, v = (torch.randn(B, H, T, D, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Bench:
    """The measurements of the variants. It makes inputs and reference results when a shape first needs them.

    It passes each row of results to `say`.
    """

    def __init__(self, say):
        self.say = say
        self.known = {}

    def problem(self, shape: str) -> tuple[Problem, dict]:
        if shape not in self.known:
            self.known.clear()
            problem = Problem(shape)
            q, f, v, bound = problem.q, problem.f, problem.v, problem.bound
            run = Launches(q, f, v, bound, D**-0.5, None)
            states, _, _ = run.states(v, None, wants_final=False)
            if not (run.bands == 1).all():
                raise SystemExit(
                    "a chunk is beyond the fast limit, but these probes have only the fast form: weaken the gates"
                )
            today = dict(states=states, o=torch.empty_like(problem.do), dv=torch.empty_like(problem.do))
            run.output(v, states, today["o"])
            dstates, _, _ = run.states(problem.do, None, reverse=True, wants_final=False)
            run.output(problem.do, dstates, today["dv"], reverse=True)
            today["dstates"] = dstates
            gold = [
                recurrent_hgrn2(*(x[n : n + 1].double() for x in (q, f, v)), bound.double())[0][0]
                for n in range(problem.B)
            ]
            row = dict(name=f"today's, {shape}", shape=shape, error=error(today["o"], gold), measured={})
            measured = row["measured"]
            measured["public"] = milliseconds(lambda: chunk_hgrn2(q, f, v, bound))
            measured["public, states kept"] = milliseconds(lambda: chunk_hgrn2(q, f, v, bound, save_states=True))
            measured["walk"] = milliseconds(lambda: run.states(v, None, wants_final=False))
            measured["output"] = milliseconds(lambda: run.output(v, states, today["o"]))
            measured["reversed walk"] = milliseconds(
                lambda: run.states(problem.do, None, reverse=True, wants_final=False)
            )
            measured["dv"] = milliseconds(lambda: run.output(problem.do, dstates, today["dv"], reverse=True))
            measured["attention"] = attention_ms(problem.B, problem.T, problem.H)
            if SEGMENTS[shape] > 1:
                before = problem.cut(run, SEGMENTS[shape])
                problem.first[False] = before(v, False)
                measured["before segments"] = milliseconds(lambda: before(v, False))
            self.say(row)
            today["gold"] = gold
            self.known[shape] = problem, today
        return self.known[shape]

    def variant(self, variant: Variant):
        row = dict(name=variant.name, shape=variant.shape, predicted=variant.predicted)
        problem, today = self.problem(variant.shape)
        o, states = problem.outputs()
        launch = problem.launch(variant, o, states)
        begun = time.time()
        compiled = launch()
        torch.cuda.synchronize()
        row["first call s"] = time.time() - begun
        if isinstance(compiled, triton.compiler.CompiledKernel):
            row.update(n_regs=compiled.n_regs, n_spills=compiled.n_spills, shared=compiled.metadata.shared)
        if variant.reverse:
            row["error"] = error(o, today["dv"])
        else:
            row["error"] = error(o, today["gold"])
            row["beside today"] = error(o, today["o"])
        if variant.states:
            row["states beside today"] = error(states, today["dstates" if variant.reverse else "states"])
        again = o.clone()
        o.fill_(torch.nan)
        launch()
        row["same bits"] = torch.equal(again, o)
        row["ms"] = ms = milliseconds(launch)
        tiles = 4 + (2 if variant.states else 0)
        row["GB/s"] = problem.B * problem.T * problem.H * D * 2 * tiles / ms / 1e6
        self.say(row)


def copy_rate() -> float:
    """Return the rate of a copy in GB/s, with reads and writes counted."""
    a = torch.empty(2**30, device="cuda", dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.nbytes / milliseconds(lambda: b.copy_(a)) / 1e6


def run_chosen(begin: int, chosen: list, say, variant):
    """Call variant(x) for each x of chosen[begin:]. Pass failures, and the number of each finished x, to `say`."""
    if begin == 0:
        say(dict(name="copy", rate=copy_rate(), device=torch.cuda.get_device_name()))
    for n, x in enumerate(chosen[begin:], begin):
        try:
            with torch.no_grad():
                variant(x)
        except Exception:
            last = traceback.format_exc().strip().splitlines()[-4:]
            say(dict(name=x.name, shape=x.shape, predicted=x.predicted, failed=last))
            if "CUDA error" in " ".join(last) or "illegal" in " ".join(last):
                os._exit(3)
        say(dict(done=n))


def tell(row: dict):
    print(json.dumps(row), flush=True)


def supervise(only: list[str], chosen: list[Variant], script: str = __file__) -> list[dict]:
    """Run the variants of a script in child processes, and return the rows. A child continues after the last one."""
    rows, begin, clock = [], 0, time.time()
    while begin < len(chosen) and time.time() - clock < LAST:
        command = [sys.executable, "-u", script, "--worker", str(begin), *(["--only", *only] if only else [])]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines = queue.Queue()

        def read(child=child, lines=lines):
            for line in child.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SECONDS)
            except queue.Empty:
                line = None
                rows.append(dict(name=chosen[begin].name, failed=[f"killed: printed nothing for {SECONDS} s"]))
                print(rows[-1], flush=True)
                child.kill()
            if line is None:
                break
            if not line.startswith("{"):
                print(line, end="")
                continue
            row = json.loads(line)
            if "done" in row:
                begin = row["done"] + 1
            else:
                rows.append(row)
                print(line, end="", flush=True)
        child.wait()
        if child.returncode and begin < len(chosen) and not any(x["name"] == chosen[begin].name for x in rows):
            rows.append(dict(name=chosen[begin].name, failed=[f"ended with {child.returncode}"]))
        if begin < len(chosen) and any(x["name"] == chosen[begin].name for x in rows):
            begin += 1
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| variant | predicted us | measured us | regs | spills | shared | GB/s | error | beside today | states |"]
    lines.append("|---" * 10 + "|")

    def number(x, form):
        return "" if x is None else format(x, form)

    for row in rows:
        if "measured" in row:
            said = ", ".join(f"{name} {1e3 * ms:.0f}" for name, ms in row["measured"].items())
            lines.append(f"| {row['name']} | | {said} | | | | | {row['error']:.2e} | | |")
        elif "failed" in row:
            lines.append(f"| {row['name']} | failed: {' '.join(row['failed'])[-200:]} |")
        elif "rate" in row:
            lines.append(f"| copy on {row['device']} | | | | | | {row['rate']:.0f} | | | |")
        else:
            bits = "" if row["same bits"] else " NOT THE SAME BITS TWICE"
            wrong = "" if row["error"] <= CEILING else " WRONG"
            lines.append(
                f"| {row['name']} | {row['predicted']} | {1e3 * row['ms']:.0f}{wrong}{bits} | {row['n_regs']} | "
                f"{row['n_spills']} | {row['shared']} | {row['GB/s']:.0f} | {row['error']:.2e} | "
                f"{number(row.get('beside today'), '.2e')} | {number(row.get('states beside today'), '.2e')} |"
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
    rows = supervise(args.only, chosen)
    if os.environ.get("OUT"):
        with open(os.path.join(os.environ["OUT"], "fused_forward.json"), "w") as file:
            json.dump(rows, file, indent=1)
    print(table(rows))


if __name__ == "__main__":
    main()
