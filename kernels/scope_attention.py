"""Triton kernels of ``scope_attention``: each block of queries walks the key ranges that its segment sees,
and nothing else.

A block belongs to one segment, so all of its rows see the same keys: whole key blocks need no mask, and only
the last one of a range, where it is ragged, masks columns. The backward pass of the keys is the same walk
over the transposed scope, one program per block of keys, so that every gradient is summed in a fixed order
without atomics (FlashAttention-2, arXiv 2307.08691). Several programs may share a block that sees far more
than the others; each then leaves its part in a slot, and a second kernel adds the parts up in their order.

Heads larger than 128 are split: scores are summed over chunks of the head, and each program makes 128 columns
of the result.
Strides travel in units of 8 elements: the compiler then knows that rows are aligned, whatever the lengths,
and no length is specialized on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok_fast.dispatch.backends import Reason
from vtok_fast.kernels import on_device_of

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
STRIDE_UNIT = tl.constexpr(8)  # elements, in which strides are counted
ITEM = tl.constexpr(5)  # numbers of an item of a work list: see `attend`
LARGEST_WHOLE_HEAD = 128  # on every GPU; Hopper has room for some larger ones
LARGEST_IN_TWO_LOOPS = tl.constexpr(128)
SMALLEST_SCALE = 2.0**-126
SCALE_IN_EXPONENT = True  # of the forward pass
HALF_STEPS = True  # of the forward pass, for what whole steps leave of a range of keys
LARGEST_ROW_STRIDE = 2**24  # elements: a block has at most 128 rows, whose distances are int32

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _load(
    x, stride, rows, columns, in_bounds, D: tl.constexpr, MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """A tile of rows of a tensor; zero where a row is not there, or a column beyond the head."""
    pointers = x + (rows[:, None] * (stride * STRIDE_UNIT) + columns[None, :])
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=in_bounds[:, None] & (columns < D)[None, :], other=0.0)
    if MASK_ROWS:
        return tl.load(pointers, mask=in_bounds[:, None], other=0.0)
    if MASK_COLUMNS:
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _over_head(
    a,
    a_stride,
    a_rows,
    a_in_bounds,
    b,
    b_stride,
    b_rows,
    b_in_bounds,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    MASK_A: tl.constexpr,
    MASK_B: tl.constexpr,
):
    """a b^T of a head that is too large to be held: both are read chunk by chunk."""
    product = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for c in range(0, D, CHUNK):
        columns = c + tl.arange(0, CHUNK)
        x = _load(a, a_stride, a_rows, columns, a_in_bounds, D, MASK_A, D % CHUNK != 0)
        y = _load(b, b_stride, b_rows, columns, b_in_bounds, D, MASK_B, D % CHUNK != 0)
        product = tl.dot(x, tl.trans(y), product, input_precision="ieee")
    return product


@triton.jit
def _task(blocks, batch_heads, CHUNKS: tl.constexpr):
    """What this program does: which chunk of the head, which head of which video, which item of the work
    list, and of that which rows and which ranges."""
    program = tl.program_id(0)
    item = blocks + program // CHUNKS // batch_heads * ITEM
    return (
        program % CHUNKS,
        program // CHUNKS % batch_heads,
        item,
        tl.load(item),
        tl.load(item + 1),
        tl.load(item + 2),
        tl.load(item + 3),
    )


@triton.jit
def _store_part(partial, slot, batch_heads, bh, rows, columns, x, mask, D: tl.constexpr, BLOCK: tl.constexpr):
    """What one of several programs made of a block of BLOCK rows goes to its slot, in float32."""
    at = (slot.to(tl.int64) * batch_heads + bh) * BLOCK + rows
    tl.store(partial + at[:, None] * D + columns[None, :], x, mask=mask)


@triton.jit
def _forward_step(
    acc,
    total,
    top,
    q_tile,
    q,
    q_row_stride,
    rows,
    in_bounds,
    k,
    k_row_stride,
    v,
    v_row_stride,
    n,
    hi,
    scale,
    columns,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    NEGATIVE: tl.constexpr,
    IN_EXPONENT: tl.constexpr,
    MASK: tl.constexpr,
):
    keys = tl.arange(0, BLOCK_N)
    keys_in_bounds = keys < hi - n
    k += n * k_row_stride.to(tl.int64) * STRIDE_UNIT
    v += n * v_row_stride.to(tl.int64) * STRIDE_UNIT
    if SPLIT:
        s = _over_head(
            q, q_row_stride, rows, in_bounds, k, k_row_stride, keys, keys_in_bounds, D, CHUNK, True, MASK
        )
    else:
        k_tile = _load(k, k_row_stride, keys, columns, keys_in_bounds, D, MASK, BLOCK_D > D)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if NEGATIVE:
        s = -s
    if MASK:
        s = tl.where(keys_in_bounds[None, :], s, -float("inf"))
    if not IN_EXPONENT:
        s *= scale
        scale = 1.0
    higher = tl.maximum(top, tl.max(s, 1) * scale)  # the scale is positive
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    v_tile = _load(v, v_row_stride, keys, columns, keys_in_bounds, D, MASK, BLOCK_D > D)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, total * shrink + tl.sum(p, 1), higher


INTEGERS = [
    "q_batch_stride",
    "q_head_stride",
    "q_row_stride",
    "k_batch_stride",
    "k_head_stride",
    "k_row_stride",
    "v_batch_stride",
    "v_head_stride",
    "v_row_stride",
    "q_len",
    "batch_heads",
    "heads",
    "group",
]


@triton.jit(do_not_specialize=[*INTEGERS, "out_batch_stride", "out_head_stride", "out_row_stride"])
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    partial,
    partial_lse,
    blocks,
    ranges,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    q_len,
    batch_heads,
    heads,
    group,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    NEGATIVE: tl.constexpr,
    IN_EXPONENT: tl.constexpr,
    REST: tl.constexpr,
):
    """One block of queries over some of its keys, with an online softmax in base 2: ``scale`` is positive and
    has a factor of log2(e); NEGATIVE: scores change their sign first; IN_EXPONENT: the scale costs no product
    of its own. What whole steps leave of a range takes steps of REST keys."""
    SPLIT: tl.constexpr = CHUNK < D
    ONE_LOOP: tl.constexpr = BLOCK_D > LARGEST_IN_TWO_LOOPS
    chunk, bh, item, start, end, first, last = _task(blocks, batch_heads, D // BLOCK_D if BLOCK_D < D else 1)
    if start >= end:
        return
    b, h = (bh // heads).to(tl.int64), bh % heads
    q += (b * q_batch_stride + h * q_head_stride + start.to(tl.int64) * q_row_stride) * STRIDE_UNIT
    k += (b * k_batch_stride + h // group * k_head_stride) * STRIDE_UNIT
    v += (b * v_batch_stride + h // group * v_head_stride) * STRIDE_UNIT
    rows, columns = tl.arange(0, BLOCK_M), chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    in_bounds = rows < end - start
    # Of no use to a split head, and then removed
    q_tile = _load(q, q_row_stride, rows, columns, in_bounds, D, True, BLOCK_D > D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    slot = tl.load(item + 4)
    for r in range(first, last):
        lo, hi = tl.load(ranges + 2 * r), tl.load(ranges + 2 * r + 1)
        # A second copy of the loop, without masks, where registers allow it
        whole = lo if ONE_LOOP else lo + (hi - lo) // BLOCK_N * BLOCK_N
        for n in range(lo, whole, BLOCK_N):
            acc, total, top = _forward_step(
                acc,
                total,
                top,
                q_tile,
                q,
                q_row_stride,
                rows,
                in_bounds,
                k,
                k_row_stride,
                v,
                v_row_stride,
                n,
                hi,
                scale,
                columns,
                D,
                BLOCK_D,
                BLOCK_N,
                CHUNK,
                SPLIT,
                NEGATIVE,
                IN_EXPONENT,
                False,
            )
        for n in range(whole, hi, REST):
            acc, total, top = _forward_step(
                acc,
                total,
                top,
                q_tile,
                q,
                q_row_stride,
                rows,
                in_bounds,
                k,
                k_row_stride,
                v,
                v_row_stride,
                n,
                hi,
                scale,
                columns,
                D,
                BLOCK_D,
                REST,
                CHUNK,
                SPLIT,
                NEGATIVE,
                IN_EXPONENT,
                True,
            )
    acc = tl.where(total[:, None] > 0, acc / total[:, None], 0.0)  # a query that sees nothing gives zeros
    mask = in_bounds[:, None] & (columns < D)[None, :]
    total = top + tl.log2(total)
    if slot >= 0:  # one of several programs of this block: `combine_kernel` adds them up
        _store_part(partial, slot, batch_heads, bh, rows, columns, acc, mask, D, BLOCK_M)
        at = (slot.to(tl.int64) * batch_heads + bh) * BLOCK_M
        tl.store(partial_lse + at + rows, total, mask=in_bounds & (chunk == 0))
    else:
        out += (
            b * out_batch_stride + h * out_head_stride + start.to(tl.int64) * out_row_stride
        ) * STRIDE_UNIT
        tl.store(
            out + rows[:, None] * (out_row_stride * STRIDE_UNIT) + columns[None, :],
            acc.to(out.dtype.element_ty),
            mask=mask,
        )
        lse += bh.to(tl.int64) * q_len + start
        tl.store(lse + rows, total * LN_2, mask=in_bounds & (chunk == 0))


@triton.jit(
    do_not_specialize=[
        "out_batch_stride",
        "out_head_stride",
        "out_row_stride",
        "q_len",
        "heads",
        "batch_heads",
    ]
)
def combine_kernel(
    partial,
    partial_lse,
    merges,
    out,
    lse,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    q_len,
    heads,
    batch_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some rows of a block whose keys several programs shared: their results weighted by what each saw, in
    their order. ``merges`` (n, 4): first row, the one after the last, first slot, slots. Programs (n * heads
    of all videos, BLOCK_M / ROWS)."""
    merge = merges + tl.program_id(0) // batch_heads * 4
    bh = tl.program_id(0) % batch_heads
    start, end, slot, slots = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
    b, h = (bh // heads).to(tl.int64), bh % heads
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    in_bounds = rows < end - start
    mask = in_bounds[:, None] & (columns < D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    top = tl.full((ROWS,), -float("inf"), tl.float32)
    for i in range(slots):
        at = ((slot.to(tl.int64) + i) * batch_heads + bh) * BLOCK_M + rows
        seen = tl.load(partial_lse + at, mask=in_bounds, other=0.0)
        x = tl.load(partial + at[:, None] * D + columns[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, seen)
        shrink, share = tl.exp2(top - higher), tl.exp2(seen - higher)
        acc = acc * shrink[:, None] + x * share[:, None]
        total = total * shrink + share
        top = higher
    out += (b * out_batch_stride + h * out_head_stride + start.to(tl.int64) * out_row_stride) * STRIDE_UNIT
    tl.store(
        out + rows[:, None] * (out_row_stride * STRIDE_UNIT) + columns[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=mask,
    )
    tl.store(lse + bh.to(tl.int64) * q_len + start + rows, (top + tl.log2(total)) * LN_2, mask=in_bounds)


@triton.jit(
    do_not_specialize=[
        "out_batch_stride",
        "out_head_stride",
        "out_row_stride",
        "grad_batch_stride",
        "grad_head_stride",
        "grad_row_stride",
        "q_len",
        "heads",
    ]
)
def delta_kernel(
    out,
    grad,
    delta,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
    q_len,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """sum(dO O) of each row."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    bh, start = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK_M
    b, h = (bh // heads).to(tl.int64), bh % heads
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    in_bounds = rows < q_len - start
    x = _load(
        out
        + (b * out_batch_stride + h * out_head_stride + start.to(tl.int64) * out_row_stride) * STRIDE_UNIT,
        out_row_stride,
        rows,
        columns,
        in_bounds,
        D,
        True,
        True,
    )
    y = _load(
        grad
        + (b * grad_batch_stride + h * grad_head_stride + start.to(tl.int64) * grad_row_stride) * STRIDE_UNIT,
        grad_row_stride,
        rows,
        columns,
        in_bounds,
        D,
        True,
        True,
    )
    tl.store(
        delta + bh.to(tl.int64) * q_len + start + rows,
        tl.sum(x.to(tl.float32) * y.to(tl.float32), 1),
        mask=in_bounds,
    )


@triton.jit
def _queries_step(
    dq,
    q_tile,
    g_tile,
    q,
    q_row_stride,
    g,
    grad_row_stride,
    rows,
    in_bounds,
    top,
    delta,
    k,
    k_row_stride,
    v,
    v_row_stride,
    n,
    hi,
    scale,
    columns,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLIT: tl.constexpr,
    MASK: tl.constexpr,
):
    keys = tl.arange(0, BLOCK_N)
    keys_in_bounds = keys < hi - n
    k += n * k_row_stride.to(tl.int64) * STRIDE_UNIT
    v += n * v_row_stride.to(tl.int64) * STRIDE_UNIT
    k_tile = _load(k, k_row_stride, keys, columns, keys_in_bounds, D, MASK, BLOCK_D > D)
    if SPLIT:
        s = _over_head(
            q, q_row_stride, rows, in_bounds, k, k_row_stride, keys, keys_in_bounds, D, CHUNK, True, MASK
        )
        dp = _over_head(
            g, grad_row_stride, rows, in_bounds, v, v_row_stride, keys, keys_in_bounds, D, CHUNK, True, MASK
        )
    else:
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        dp = tl.dot(
            g_tile,
            tl.trans(_load(v, v_row_stride, keys, columns, keys_in_bounds, D, MASK, BLOCK_D > D)),
            input_precision="ieee",
        )
    p = tl.exp2(s * scale - top[:, None])
    if MASK:
        p = tl.where(keys_in_bounds[None, :], p, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")


@triton.jit(
    do_not_specialize=[
        *INTEGERS,
        "grad_batch_stride",
        "grad_head_stride",
        "grad_row_stride",
        "dq_batch_stride",
        "dq_head_stride",
        "dq_row_stride",
    ]
)
def queries_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    dq,
    partial,
    blocks,
    ranges,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
    dq_batch_stride,
    dq_head_stride,
    dq_row_stride,
    q_len,
    batch_heads,
    heads,
    group,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dQ of one block of queries."""
    SPLIT: tl.constexpr = CHUNK < D
    ONE_LOOP: tl.constexpr = BLOCK_D > LARGEST_IN_TWO_LOOPS
    chunk, bh, item, start, end, first, last = _task(blocks, batch_heads, D // BLOCK_D if BLOCK_D < D else 1)
    if start >= end:
        return
    b, h = (bh // heads).to(tl.int64), bh % heads
    q += (b * q_batch_stride + h * q_head_stride + start.to(tl.int64) * q_row_stride) * STRIDE_UNIT
    grad += (
        b * grad_batch_stride + h * grad_head_stride + start.to(tl.int64) * grad_row_stride
    ) * STRIDE_UNIT
    k += (b * k_batch_stride + h // group * k_head_stride) * STRIDE_UNIT
    v += (b * v_batch_stride + h // group * v_head_stride) * STRIDE_UNIT
    rows, columns = tl.arange(0, BLOCK_M), chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    in_bounds = rows < end - start
    row = bh.to(tl.int64) * q_len + start
    top = tl.load(lse + row + rows, mask=in_bounds, other=0.0) * LOG2_E
    delta_rows = tl.load(delta + row + rows, mask=in_bounds, other=0.0)
    q_tile = _load(q, q_row_stride, rows, columns, in_bounds, D, True, BLOCK_D > D)
    g_tile = _load(grad, grad_row_stride, rows, columns, in_bounds, D, True, BLOCK_D > D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for r in range(first, last):
        lo, hi = tl.load(ranges + 2 * r), tl.load(ranges + 2 * r + 1)
        whole = lo if ONE_LOOP else lo + (hi - lo) // BLOCK_N * BLOCK_N
        for n in range(lo, whole, BLOCK_N):
            acc = _queries_step(
                acc,
                q_tile,
                g_tile,
                q,
                q_row_stride,
                grad,
                grad_row_stride,
                rows,
                in_bounds,
                top,
                delta_rows,
                k,
                k_row_stride,
                v,
                v_row_stride,
                n,
                hi,
                scale,
                columns,
                D,
                BLOCK_D,
                BLOCK_N,
                CHUNK,
                SPLIT,
                False,
            )
        for n in range(whole, hi, BLOCK_N):
            acc = _queries_step(
                acc,
                q_tile,
                g_tile,
                q,
                q_row_stride,
                grad,
                grad_row_stride,
                rows,
                in_bounds,
                top,
                delta_rows,
                k,
                k_row_stride,
                v,
                v_row_stride,
                n,
                hi,
                scale,
                columns,
                D,
                BLOCK_D,
                BLOCK_N,
                CHUNK,
                SPLIT,
                True,
            )
    acc *= scale * LN_2
    mask = in_bounds[:, None] & (columns < D)[None, :]
    slot = tl.load(item + 4)
    if slot >= 0:  # one of several programs of this block: `add_kernel` adds them up
        _store_part(partial, slot, batch_heads, bh, rows, columns, acc, mask, D, BLOCK_M)
    else:
        dq += (b * dq_batch_stride + h * dq_head_stride + start.to(tl.int64) * dq_row_stride) * STRIDE_UNIT
        tl.store(
            dq + rows[:, None] * (dq_row_stride * STRIDE_UNIT) + columns[None, :],
            acc.to(dq.dtype.element_ty),
            mask=mask,
        )


@triton.jit(
    do_not_specialize=[
        *INTEGERS,
        "grad_batch_stride",
        "grad_head_stride",
        "grad_row_stride",
        "dk_batch_stride",
        "dk_head_stride",
        "dk_row_stride",
        "dv_batch_stride",
        "dv_head_stride",
        "dv_row_stride",
    ]
)
def keys_kernel(
    q,
    k,
    v,
    grad,
    lse,
    delta,
    dk,
    dv,
    partial_dk,
    partial_dv,
    blocks,
    ranges,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    grad_batch_stride,
    grad_head_stride,
    grad_row_stride,
    dk_batch_stride,
    dk_head_stride,
    dk_row_stride,
    dv_batch_stride,
    dv_head_stride,
    dv_row_stride,
    q_len,
    batch_heads,
    heads,
    group,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dK and dV of one block of keys. ``blocks`` and ``ranges`` are of the transposed scope, ``heads`` are
    those of the keys."""
    SPLIT: tl.constexpr = CHUNK < D
    chunk, bh, item, start, end, first, last = _task(blocks, batch_heads, D // BLOCK_D if BLOCK_D < D else 1)
    if start >= end:
        return
    b, h = (bh // heads).to(tl.int64), bh % heads
    k += (b * k_batch_stride + h * k_head_stride + start.to(tl.int64) * k_row_stride) * STRIDE_UNIT
    v += (b * v_batch_stride + h * v_head_stride + start.to(tl.int64) * v_row_stride) * STRIDE_UNIT
    keys, rows, columns = (
        tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_M),
        chunk * BLOCK_D + tl.arange(0, BLOCK_D),
    )
    in_bounds = keys < end - start
    k_tile = _load(k, k_row_stride, keys, columns, in_bounds, D, True, BLOCK_D > D)
    v_tile = _load(v, v_row_stride, keys, columns, in_bounds, D, True, BLOCK_D > D)
    dk_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i in range(group):
        q_head = h * group + i
        qi, gi = (
            q + (b * q_batch_stride + q_head * q_head_stride) * STRIDE_UNIT,
            grad + (b * grad_batch_stride + q_head * grad_head_stride) * STRIDE_UNIT,
        )
        row = (b * heads * group + q_head) * q_len
        for r in range(first, last):
            lo, hi = tl.load(ranges + 2 * r), tl.load(ranges + 2 * r + 1)
            # Every block is masked, whole or not: a second copy of the loop would cost more, in registers,
            # than one select.
            for m in range(lo, hi, BLOCK_M):
                queries_in_bounds = rows < hi - m
                qm, gm = (
                    qi + m * q_row_stride.to(tl.int64) * STRIDE_UNIT,
                    gi + m * grad_row_stride.to(tl.int64) * STRIDE_UNIT,
                )
                top = tl.load(lse + row + m + rows, mask=queries_in_bounds, other=0.0) * LOG2_E
                delta_rows = tl.load(delta + row + m + rows, mask=queries_in_bounds, other=0.0)
                q_tile = _load(qm, q_row_stride, rows, columns, queries_in_bounds, D, True, BLOCK_D > D)
                g_tile = _load(gm, grad_row_stride, rows, columns, queries_in_bounds, D, True, BLOCK_D > D)
                if SPLIT:
                    s = _over_head(
                        k,
                        k_row_stride,
                        keys,
                        in_bounds,
                        qm,
                        q_row_stride,
                        rows,
                        queries_in_bounds,
                        D,
                        CHUNK,
                        True,
                        True,
                    )
                else:
                    s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                p = tl.where(queries_in_bounds[None, :], tl.exp2(s * scale - top[None, :]), 0.0)
                dv_acc = tl.dot(p.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
                if SPLIT:
                    dp = _over_head(
                        v,
                        v_row_stride,
                        keys,
                        in_bounds,
                        gm,
                        grad_row_stride,
                        rows,
                        queries_in_bounds,
                        D,
                        CHUNK,
                        True,
                        True,
                    )
                else:
                    dp = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                ds = p * (dp - delta_rows[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    mask = in_bounds[:, None] & (columns < D)[None, :]
    dk_acc *= scale * LN_2
    slot = tl.load(item + 4)
    if slot >= 0:  # one of several programs of this block: `add_kernel` adds them up
        _store_part(partial_dk, slot, batch_heads, bh, keys, columns, dk_acc, mask, D, BLOCK_N)
        _store_part(partial_dv, slot, batch_heads, bh, keys, columns, dv_acc, mask, D, BLOCK_N)
    else:
        dk += (b * dk_batch_stride + h * dk_head_stride + start.to(tl.int64) * dk_row_stride) * STRIDE_UNIT
        dv += (b * dv_batch_stride + h * dv_head_stride + start.to(tl.int64) * dv_row_stride) * STRIDE_UNIT
        tl.store(
            dk + keys[:, None] * (dk_row_stride * STRIDE_UNIT) + columns[None, :],
            dk_acc.to(dk.dtype.element_ty),
            mask=mask,
        )
        tl.store(
            dv + keys[:, None] * (dv_row_stride * STRIDE_UNIT) + columns[None, :],
            dv_acc.to(dv.dtype.element_ty),
            mask=mask,
        )


@triton.jit(
    do_not_specialize=["out_batch_stride", "out_head_stride", "out_row_stride", "heads", "batch_heads"]
)
def add_kernel(
    partial,
    merges,
    out,
    out_batch_stride,
    out_head_stride,
    out_row_stride,
    heads,
    batch_heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Some rows of a gradient that several programs made parts of: their sum, in their order. Programs and
    ``merges`` as for `combine_kernel`."""
    merge = merges + tl.program_id(0) // batch_heads * 4
    bh = tl.program_id(0) % batch_heads
    start, end, slot, slots = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2), tl.load(merge + 3)
    b, h = (bh // heads).to(tl.int64), bh % heads
    rows, columns = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    mask = (rows < end - start)[:, None] & (columns < D)[None, :]
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for i in range(slots):
        at = ((slot.to(tl.int64) + i) * batch_heads + bh) * BLOCK_M + rows
        acc += tl.load(partial + at[:, None] * D + columns[None, :], mask=mask, other=0.0)
    out += (b * out_batch_stride + h * out_head_stride + start.to(tl.int64) * out_row_stride) * STRIDE_UNIT
    tl.store(
        out + rows[:, None] * (out_row_stride * STRIDE_UNIT) + columns[None, :],
        acc.to(out.dtype.element_ty),
        mask=mask,
    )


# ---- configurations ----------------------------------------------------------------------------------------


class Config(NamedTuple):
    """The tile of a kernel: ``block_m`` queries by ``block_n`` keys by ``block_d`` of the head, which is read
    ``chunk`` at a time where it is too large to be held."""

    block_m: int
    block_n: int
    block_d: int
    chunk: int
    num_warps: int
    num_stages: int


# (block_m, block_n, num_warps, num_stages) per kernel and padded head, 256 for all that are split; then what
# differs on a family of GPUs. The largest that no register spills from, on any head of that
# size.
_NARROW = {
    "forward": {
        16: ((128, 64, 4, 3), {120: (128, 64, 8, 3)}),
        32: ((128, 64, 4, 3), {}),
        64: ((128, 64, 4, 3), {120: (128, 64, 8, 3)}),
        128: ((128, 64, 8, 3), {"hip": (64, 64, 4, 2), 100: (128, 32, 8, 2), 120: (64, 64, 8, 2)}),
        256: ((128, 64, 8, 2), {100: (64, 64, 8, 2)}),
    },
    "queries": {
        16: ((128, 64, 4, 3), {}),
        32: ((128, 64, 4, 3), {}),
        64: ((128, 64, 8, 3), {"hip": (64, 64, 4, 2)}),
        128: ((64, 64, 8, 2), {"hip": (64, 32, 4, 2), 90: (128, 64, 8, 2)}),
        256: ((128, 64, 8, 2), {"hip": (64, 64, 8, 2), 120: (64, 64, 8, 2)}),
    },
    "keys": {
        16: ((64, 128, 8, 2), {"hip": (32, 64, 4, 2)}),
        32: ((64, 128, 8, 3), {"hip": (32, 64, 4, 2)}),
        64: ((32, 128, 8, 2), {90: (64, 128, 8, 2), 100: (64, 128, 8, 2)}),
        128: (
            (64, 64, 8, 2),
            {"hip": (32, 64, 4, 2), 90: (32, 128, 8, 2), 120: (32, 64, 8, 2)},
        ),
        256: ((64, 64, 8, 2), {"hip": (16, 64, 8, 2), 90: (32, 128, 8, 2), 100: (32, 128, 8, 2)}),
    },
}
_SHORT = {
    "forward": dict.fromkeys((32, 128, 256), (32, 64, 4, 2))
    | {16: (32, 64, 8, 2), 64: (32, 32, 4, 2)},  # 64 keys spill on 8.6 and 8.9
    "queries": {
        16: (32, 32, 4, 2),
        32: (32, 64, 4, 2),
        64: (32, 64, 4, 2),
        128: (32, 32, 8, 2),
        256: (32, 64, 8, 2),
    },
    "keys": {
        16: (64, 32, 4, 2),
        32: (64, 32, 4, 2),
        64: (64, 32, 4, 2),
        128: (32, 32, 4, 2),
        256: (64, 32, 4, 2),
    },
}
_SHORT_ON_AMD = {("queries", 256): (32, 64, 4, 2)}  # where that differs
# float32 without TF32 runs on the ordinary units, whose operands are registers.
_FLOAT32 = {
    "forward": {
        16: (32, 32, 4, 2),
        32: (32, 32, 4, 2),
        64: (32, 32, 8, 2),
        128: (32, 16, 8, 2),
        256: (32, 16, 8, 2),
    },
    "queries": {
        16: (64, 32, 4, 2),
        32: (32, 32, 4, 2),
        64: (32, 32, 8, 2),
        128: (16, 16, 4, 2),
        256: (16, 16, 4, 2),
    },
    "keys": {
        16: (32, 64, 8, 2),
        32: (32, 64, 8, 2),
        64: (32, 64, 8, 2),
        128: (16, 32, 8, 2),
        256: (16, 32, 8, 2),
    },
}
KERNELS = {"forward": forward_kernel, "queries": queries_kernel, "keys": keys_kernel}


def why_not_head(dim: int) -> Reason:
    """Why there is no kernel for a head of this size, or None."""
    if dim <= LARGEST_WHOLE_HEAD and dim % 8 == 0 or dim <= 1024 and dim % 128 == 0:
        return None
    return f"no kernel for a head of {dim}: multiples of 8 up to {LARGEST_WHOLE_HEAD}, and of 128 up to 1024"


# Heads that are held whole where there are registers and shared memory for them, by family: no score is
# computed twice.
_WHOLE = {
    "forward": {90: {256: (128, 32, 8, 3), 512: (64, 32, 8, 2)}},
    "queries": {90: {256: (64, 32, 8, 2), 512: (64, 16, 8, 2)}},
    "keys": {90: {256: (16, 64, 8, 2), 512: (16, 32, 8, 2)}},
}


def family_of(gpu: int | str) -> int | str:
    """The oldest GPU with the same tiles: 80, 90, 100 or 120 (with as little shared memory as 8.6 and 8.9);
    or "hip"."""
    if isinstance(gpu, str):
        return gpu
    if gpu in (86, 89) or gpu >= 120:
        return 120
    return 100 if gpu >= 100 else 90 if gpu >= 90 else 80


def config(kernel: str, dim: int, itemsize: int, gpu: int | str, short: bool = False) -> Config:
    """The configuration of ``forward``, ``queries`` or ``keys`` for a head of ``dim`` in elements of
    ``itemsize`` bytes.

    Args:
        gpu: the compute capability, such as 90, or "hip".
        short: segments are so short that large blocks of rows would be mostly empty.
    """
    head = max(16, triton.next_power_of_2(dim)) if dim <= LARGEST_WHOLE_HEAD else 256
    family = family_of(gpu)
    whole = _WHOLE[kernel].get(family, {}).get(dim)
    if whole and itemsize < 4 and not short:
        return Config(*whole[:2], dim, dim, *whole[2:])
    if itemsize == 4:
        tile = _FLOAT32[kernel][head]
    elif short:
        tile = _SHORT[kernel][head]
        if family == "hip":
            tile = _SHORT_ON_AMD.get((kernel, head), tile)
    else:
        default, others = _NARROW[kernel][head]
        tile = others.get(family, default)
    block_d = min(head, 128)
    chunk = 64 if head == 256 else block_d
    return Config(*tile[:2], block_d, min(chunk, 32) if itemsize == 4 and head >= 128 else chunk, *tile[2:])


def variants(kernel: str, c: Config) -> list[Config]:
    """What a tuning table may choose instead of ``c`` (which is among them): half as many rows of the result,
    with twice as many warps for each or, in narrow heads, as many; half as many rows of what is walked over;
    fewer stages; a head that is held whole in chunks. Some spill by a few bytes where c does not, which
    measuring them judges."""
    held, walked = ("block_n", "block_m") if kernel == "keys" else ("block_m", "block_n")
    shapes = [c]
    if getattr(c, held) >= (64 if c.block_d < 128 else 128):
        half = c._replace(**{held: getattr(c, held) // 2})
        shapes += (
            [half, half._replace(num_warps=c.num_warps // 2)]
            if c.num_warps >= 8 and c.block_d < 128
            else [half]
        )
    if getattr(c, walked) >= 32 and (c.num_warps >= 8 or c.block_d < 128):
        shapes.append(c._replace(**{walked: getattr(c, walked) // 2}))
    found = [shape._replace(num_stages=stages) for shape in shapes for stages in range(c.num_stages, 1, -1)]
    if c.block_d > LARGEST_WHOLE_HEAD:
        default, others = _NARROW[kernel][256]
        m, n, *rest = others.get(90, default)
        found.append(Config(m, n, 128, 64, *rest))
    return found


# ---- launchers ---------------------------------------------------------------------------------------------


def aligned(x: Tensor) -> Tensor:
    """The tensor, or a copy that the kernels read: a base that is a multiple of 16 bytes, strides of 1 in the
    head and multiples of 8 elsewhere, and rows of a block within 2**31 elements."""
    fits = (
        x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and not any(n > 1 and s % STRIDE_UNIT.value for n, s in zip(x.shape, x.stride()[:3]))
        and (x.shape[2] == 1 or x.stride(2) < LARGEST_ROW_STRIDE)
    )
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _strides(*tensors: Tensor) -> list[int]:
    return [
        0 if n == 1 else s // STRIDE_UNIT.value for x in tensors for n, s in zip(x.shape[:3], x.stride()[:3])
    ]


def constants(dim: int, c: Config) -> dict[str, int]:
    """What a tile makes known to the compiler."""
    return {
        "D": dim,
        "BLOCK_D": c.block_d,
        "BLOCK_M": c.block_m,
        "BLOCK_N": c.block_n,
        "CHUNK": c.chunk,
    }


def rest(c: Config) -> int:
    """Keys of a step of the forward pass over what whole steps leave of a range: half as many for blocks of
    128 rows and whole heads, where a loop over them takes fewer registers than a masked copy of the other.
    (Elsewhere, and in the gradient of queries, registers spill.)"""
    whole = c.chunk == c.block_d <= LARGEST_IN_TWO_LOOPS.value
    halved = HALF_STEPS and c.block_m >= 128 and c.block_n >= 64 and whole
    return c.block_n // 2 if halved else c.block_n


def _launch(
    kernel: str, c: Config, blocks: Tensor, batch_heads: int, x: Tensor, *args: object, **more: object
) -> None:
    dim = x.shape[3]
    grid = (len(blocks) * batch_heads * max(dim // c.block_d, 1),)
    if not grid[0]:
        return
    with on_device_of(x):
        KERNELS[kernel][grid](
            *args,
            **constants(dim, c),
            **more,
            num_warps=c.num_warps,
            num_stages=c.num_stages,
        )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    work: Tensor,
    ranges: Tensor,
    merges: Tensor | None,
    slots: int,
    scale: float,
    c: Config,
) -> None:
    """Writes ``out`` and ``lse`` (B, heads, Sq).

    ``work`` (n, 5) int32 are, for each block of at most ``c.block_m`` queries, its first row, the one after
    its last, the same of its ranges, and -1. Where several programs share a block's keys, each has an item of
    its own, with a slot for its result in place of -1, of which there are ``slots``; ``merges`` are then what
    `combine_kernel` adds up.
    """
    b, h, q_len, dim = q.shape
    partial = partial_lse = lse  # of no use
    if slots:
        partial = _partial(slots, q, c.block_m)
        partial_lse = torch.empty(slots * b * h, c.block_m, dtype=torch.float32, device=q.device)
    _launch(
        "forward",
        c,
        work,
        b * h,
        q,
        q,
        k,
        v,
        out,
        lse,
        partial,
        partial_lse,
        work,
        ranges,
        *_strides(q, k, v, out),
        q_len,
        b * h,
        h,
        h // k.shape[1],
        # It multiplies -inf where a key is masked, so that it is never 0
        max(abs(scale) * LOG2_E.value, SMALLEST_SCALE),
        NEGATIVE=scale < 0,
        IN_EXPONENT=SCALE_IN_EXPONENT,
        REST=rest(c),
    )
    if slots:
        grid, tile = _merging(out, merges, c.block_m)
        with on_device_of(q):
            combine_kernel[grid](
                partial, partial_lse, merges, out, lse, *_strides(out), q_len, h, b * h, **tile
            )


def _partial(slots: int, x: Tensor, block: int) -> Tensor:
    """Room for what several programs make of blocks of rows of ``x``, for each head of each video."""
    b, h, _, dim = x.shape
    return torch.empty(slots * b * h, block, dim, dtype=torch.float32, device=x.device)


def _merging(out: Tensor, merges: Tensor, block: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and tile of a kernel that makes one of several parts of blocks of rows."""
    b, h, _, dim = out.shape
    block_d = triton.next_power_of_2(dim)
    rows = min(block, max(1, 4096 // block_d))
    tile = {"D": dim, "BLOCK_D": block_d, "BLOCK_M": block, "ROWS": rows}
    return (len(merges) * b * h, block // rows), tile


def _add(partial: Tensor, merges: Tensor | None, out: Tensor, block: int) -> None:
    """Writes the sum of their parts to the rows of ``out`` that ``merges`` names."""
    if merges is None:
        return
    b, h = out.shape[:2]
    grid, tile = _merging(out, merges, block)
    with on_device_of(out):
        add_kernel[grid](partial, merges, out, *_strides(out), h, b * h, **tile)


def delta(out: Tensor, grad: Tensor) -> Tensor:
    """(B, heads, Sq) float32: the sum over the head of ``out * grad``."""
    b, h, q_len, dim = out.shape
    result = torch.empty(b, h, q_len, dtype=torch.float32, device=out.device)
    block_d = triton.next_power_of_2(dim)
    block_m = max(1, 4096 // block_d)
    with on_device_of(out):
        grid = (b * h * triton.cdiv(q_len, block_m),)
        delta_kernel[grid](
            out, grad, result, *_strides(out, grad), q_len, h, D=dim, BLOCK_D=block_d, BLOCK_M=block_m
        )
    return result


def queries_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    work: Tensor,
    ranges: Tensor,
    merges: Tensor | None,
    slots: int,
    scale: float,
    c: Config,
) -> None:
    """Writes ``dq``; the plan is as for `attend`."""
    b, h, q_len, _ = q.shape
    partial = _partial(slots, q, c.block_m) if slots else lse  # else of no use
    _launch(
        "queries",
        c,
        work,
        b * h,
        q,
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dq,
        partial,
        work,
        ranges,
        *_strides(q, k, v, grad, dq),
        q_len,
        b * h,
        h,
        h // k.shape[1],
        scale * LOG2_E.value,
    )
    _add(partial, merges, dq, c.block_m)


def keys_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    work: Tensor,
    ranges: Tensor,
    merges: Tensor | None,
    slots: int,
    scale: float,
    c: Config,
) -> None:
    """Writes ``dk`` and ``dv``; the plan is that of the transposed scope, in blocks of at most ``c.block_n``
    keys."""
    b, h, q_len, _ = q.shape
    kv_heads = k.shape[1]
    parts = [_partial(slots, x, c.block_n) if slots else lse for x in (k, v)]
    _launch(
        "keys",
        c,
        work,
        b * kv_heads,
        q,
        q,
        k,
        v,
        grad,
        lse,
        delta,
        dk,
        dv,
        *parts,
        work,
        ranges,
        *_strides(q, k, v, grad, dk, dv),
        q_len,
        b * kv_heads,
        kv_heads,
        h // kv_heads,
        scale * LOG2_E.value,
    )
    for partial, out in zip(parts, (dk, dv)):
        _add(partial, merges, out, c.block_n)
