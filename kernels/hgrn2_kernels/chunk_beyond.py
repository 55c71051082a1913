"""The chunks that the kernels for Hopper leave over: those beyond the fast limit, on a fixed number of programs.

beyond_list_kernel writes the numbers of these chunks into lists, in order. The programs of the two other kernels go
through a list in equal steps, so that all get the same number of chunks, and compute each chunk as chunk_output and
chunk_gradient do. Which program computes a chunk does not change the result. So the results do not depend on the number
of programs, and have the same bits every time.

A list is an int32 tensor. Its first number is the count of its items, and the items follow. An item is on the list if
its count of bands is above 1, and also if the count is 0: then it lies after the last packed sequence, and its results
are zeros.
"""

import triton
import triton.language as tl

from hgrn2_kernels.chunk_gradient import bands_of_item, gradient_of, no_gradient
from hgrn2_kernels.chunk_output import bands_of_chunk, no_output, output_of
from hgrn2_kernels.triton_math import form_of


@triton.jit
def is_listed(bands, items, end, n_items, K: tl.constexpr, BK: tl.constexpr, BF: tl.constexpr, BLOCKS: tl.constexpr):
    """Return 1 where items below `end` are on the list, and 0 elsewhere. With BLOCKS, an item is BK channels."""
    m_items = items < end
    # the last item stands in for items that do not exist
    items = tl.minimum(items, n_items - 1)
    if BLOCKS:
        n_bands = bands_of_item(bands, items, K, BK, BF)
    else:
        n_bands = bands_of_chunk(bands, items, (K + BF - 1) // BF).to(tl.int32)
    return (m_items & (n_bands != 1)).to(tl.int32)


@triton.jit
def list_items(
    bands,
    listed,
    n_items,
    K: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the items of this program's part to the list, and from the last part also the count of all items."""
    first = tl.program_id(0) * SIZE
    if first < n_items:
        # the items before this part are counted in large steps, because a step takes as long as its loads
        STEP: tl.constexpr = 4 * SIZE
        before = tl.zeros([STEP], tl.int32)
        for i in range(0, first, STEP):
            before += is_listed(bands, i + tl.arange(0, STEP), first, n_items, K, BK, BF, BLOCKS)
        items = first + tl.arange(0, SIZE)
        own = is_listed(bands, items, n_items, n_items, K, BK, BF, BLOCKS)
        place = tl.sum(before, 0) + tl.cumsum(own, 0)
        tl.store(listed + place, items, mask=own != 0)
        if first + SIZE >= n_items:
            tl.store(listed, tl.max(place, 0))


@triton.jit(do_not_specialize=["n_chunks"])
def beyond_list_kernel(
    bands,  # [chunks, H, K / BF], counts of bands
    chunks,  # int32, out: list of (chunk, head), with n_chunks items at most
    blocks,  # int32, out: list of (chunk, head, block of BK channels)
    n_chunks,  # number of chunks times the number of heads
    K: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    SIZE: tl.constexpr,  # items of a program
):
    """List the items of chunk_output (program_id(1) is 0) and of chunk_gradient (program_id(1) is 1)."""
    if tl.program_id(1) == 0:
        list_items(bands, chunks, n_chunks, K, BK, BF, SIZE, False)
    else:
        list_items(bands, blocks, n_chunks * ((K + BK - 1) // BK), K, BK, BF, SIZE, True)


@triton.jit(do_not_specialize=["T", "NT"])
def beyond_output_kernel(
    q,
    f,
    y,
    bound,
    states,
    bands,
    o,
    sums,
    ones,
    cu_seqlens,
    chunk_sequence,
    chunk_first,
    listed,  # int32, see the top of this file
    stride_qb,
    stride_qt,
    stride_qh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_yb,
    stride_yt,
    stride_yh,
    stride_ob,
    stride_ot,
    stride_oh,
    inverse_scale,
    T,
    NT,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DT: tl.constexpr,
    REVERSE: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute the listed items of chunk_output_kernel, whose arguments the others are."""
    n_items = tl.load(listed)
    # computed before the loop, tiles of addresses would occupy registers through the whole loop
    for i in tl.range(tl.program_id(0), n_items, tl.num_programs(0), num_stages=1, disable_licm=True):
        i_ch = tl.load(listed + 1 + i)
        form = form_of(bands_of_chunk(bands, i_ch, (K + BK - 1) // BK))
        # no chunk on the list has the fast form, which is form 0
        for FORM in tl.static_range(1, 3):
            if form == FORM:
                # fmt: off
                output_of(
                    i_ch, q, f, y, bound, states, bands, o, sums, ones, cu_seqlens, chunk_sequence, chunk_first,
                    stride_qb, stride_qt, stride_qh, stride_fb, stride_ft, stride_fh, stride_yb, stride_yt,
                    stride_yh, stride_ob, stride_ot, stride_oh, inverse_scale, T, NT, H, K, V, C, LEVELS, BK, BV,
                    DT, REVERSE, BOUNDED, PACKED, FULL, STAGES, FORM,
                )
                # fmt: on
        if PACKED:
            if form < 0:
                # fmt: off
                no_output(
                    i_ch, o, cu_seqlens, chunk_sequence, chunk_first, stride_ot, stride_oh, T, H, V, C, BV, FULL,
                )
                # fmt: on


@triton.jit(do_not_specialize=["T", "NT", "NC"])
def beyond_gradient_kernel(
    q,
    f,
    v,
    do,
    bound,
    states,
    dstates,
    bands,
    dq,
    df,
    dbound,
    sums,
    ones,
    cu_seqlens,
    chunk_sequence,
    chunk_first,
    listed,  # int32, see the top of this file
    stride_qb,
    stride_qt,
    stride_qh,
    stride_fb,
    stride_ft,
    stride_fh,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_dob,
    stride_dot,
    stride_doh,
    stride_dqb,
    stride_dqt,
    stride_dqh,
    stride_dfb,
    stride_dft,
    stride_dfh,
    inverse_scale,
    T,
    NT,
    NC,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
    BV: tl.constexpr,
    AHEAD: tl.constexpr,
    DT: tl.constexpr,
    BOUNDED: tl.constexpr,
    PACKED: tl.constexpr,
    FULL: tl.constexpr,
):
    """Compute the listed items of chunk_gradient_kernel, whose arguments the others are."""
    n_items = tl.load(listed)
    # computed before the loop, tiles of addresses would occupy registers through the whole loop
    for i in tl.range(tl.program_id(0), n_items, tl.num_programs(0), num_stages=1, disable_licm=True):
        item = tl.load(listed + 1 + i)
        n_bands = bands_of_item(bands, item, K, BK, BF)
        form = form_of(n_bands)
        for FORM in tl.static_range(1, 3):
            if form == FORM:
                # fmt: off
                gradient_of(
                    item, n_bands, q, f, v, do, bound, states, dstates, dq, df, dbound, sums, ones,
                    cu_seqlens, chunk_sequence, chunk_first, stride_qb, stride_qt, stride_qh, stride_fb, stride_ft,
                    stride_fh, stride_vb, stride_vt, stride_vh, stride_dob, stride_dot, stride_doh, stride_dqb,
                    stride_dqt, stride_dqh, stride_dfb, stride_dft, stride_dfh, inverse_scale, T, NT, NC, H, K, V,
                    C, LEVELS, BK, BV, AHEAD, DT, BOUNDED, PACKED, FULL, FORM,
                )
                # fmt: on
        if PACKED:
            if form < 0:
                # fmt: off
                no_gradient(
                    item, dq, df, cu_seqlens, chunk_sequence, chunk_first,
                    stride_dqt, stride_dqh, stride_dft, stride_dfh, T, H, K, C, BK, FULL,
                )
                # fmt: on
