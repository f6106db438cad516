"""Triton kernels of ``token_packing``: scores per token, budgets, selection, packing, unpacking.

Selection is a radix select, one program per clip: four histograms of 8 bits find the bound, a last pass marks
what is above it and, in the order of positions, as many equals as the budget leaves. Clips that fit into
registers are read once. Packing and unpacking
are two launches: one program per clip counts the kept tokens before each block of positions, then each block
knows its first row and moves its tokens. Nothing waits for the device, and no shape depends on data, unless
``capacity`` is None.

Means are sums of integers (see `vtok_fast.reference.token_packing`), so the bits are those of every
other backend; products and sums in float64 stay apart (``enable_fp_fusion=False``) for the same reason.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vtok_fast.dispatch import tuning
from vtok_fast.dispatch.tuning import power_of_two
from vtok_fast.kernels import on_device_of, tuned_tile, unit_of

BUDGET, CAPACITY, ROWS = 1, 2, 4  # bits of the error flag
STRATEGIES = {"elbo": 0, "global_elbo": 1, "bin": 2, "elbo_ema": 1}
SELECT_BLOCK, SELECT_WARPS = 4096, 16  # eight warps spill on 10.0
FEW = 8192  # tokens of a clip whose keys fit into the registers of one program; twice as many spill
ENOUGH = 1024  # programs of the scores, which fill a GPU; where there are fewer, each does less
CLIPS = 128  # totals that are added up at a time
# Integers that differ from call to call: nothing is compiled anew for one that happens to be 1 or a multiple
# of 16. Those that say what is aligned are counted in units that the compiler knows.
LENGTHS = [
    *("channels", "frames", "t", "h", "w", "n", "rate_step", "blocks", "clips", "capacity", "pitch", "rows"),
    *("fill", "tb", "tc", "tn"),
    *(
        f"{name}_{of}_stride"
        for name in ("video", "other")
        for of in ("batch", "channel", "frame", "row", "column")
    ),
]

# ---- kernels -----------------------------------------------------------------------------------------------


@triton.jit
def _fixed(value):
    """Multiples of 2^-30 up to 4096, as int64; a NaN counts as 4096."""
    return (tl.where(value < 4096.0, value, 4096.0) * 1073741824.0).to(tl.int64)


@triton.jit(do_not_specialize=LENGTHS)
def scores_kernel(
    video,
    other,
    scores,
    video_batch_stride,
    video_channel_stride,
    video_frame_stride,
    video_row_stride,
    video_column_stride,
    other_batch_stride,
    other_channel_stride,
    other_frame_stride,
    other_row_stride,
    other_column_stride,
    channels,
    frames,
    t,
    h,
    w,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    UNIT: tl.constexpr,
    ADJACENT: tl.constexpr,
):
    """CELLS neighboring tokens of one row of tokens; COLUMNS values of each of ROWS rows of pixels belong to
    each. Strides are counted in UNIT; ADJACENT: columns follow one another."""
    chunks = tl.cdiv(w, CELLS)
    task = tl.program_id(0)
    x = task % chunks * CELLS + tl.arange(0, CELLS)
    y = (task // chunks % h).to(tl.int64)
    group = task // chunks // h % t
    b = (task // chunks // h // t).to(tl.int64)
    first = tl.where(group == 0, 0, 1 + (group - 1) * frames).to(tl.int64)
    depth = tl.where(group == 0, 1, frames)
    total = tl.zeros((BLOCK_ROWS, CELLS, BLOCK_COLUMNS), tl.int64)
    bad = tl.zeros((BLOCK_ROWS, CELLS, BLOCK_COLUMNS), tl.int32)
    for plane in range(0, depth * channels):
        f = first + plane // channels
        c = (plane % channels).to(tl.int64)
        for r in range(0, ROWS, BLOCK_ROWS):
            for k in range(0, COLUMNS, BLOCK_COLUMNS):
                row = (r + tl.arange(0, BLOCK_ROWS))[:, None, None]
                column = (k + tl.arange(0, BLOCK_COLUMNS))[None, None, :]
                in_bounds = (row < ROWS) & (x[None, :, None] < w) & (column < COLUMNS)
                along = (x[None, :, None] * COLUMNS + column).to(tl.int64)
                down = y * ROWS + row
                p = tl.load(
                    video
                    + b * video_batch_stride * UNIT
                    + c * video_channel_stride * UNIT
                    + f * video_frame_stride * UNIT
                    + down * video_row_stride * UNIT
                    + (along if ADJACENT else along * video_column_stride * UNIT),
                    mask=in_bounds,
                    other=0.0,
                ).to(tl.float32)
                q = tl.load(
                    other
                    + b * other_batch_stride * UNIT
                    + c * other_channel_stride * UNIT
                    + f * other_frame_stride * UNIT
                    + down * other_row_stride * UNIT
                    + (along if ADJACENT else along * other_column_stride * UNIT),
                    mask=in_bounds,
                    other=0.0,
                ).to(tl.float32)
                difference = tl.abs(p - q)
                total += _fixed(difference)
                bad |= (difference != difference).to(tl.int32)
    sums = tl.sum(tl.sum(total, 2), 0)
    nan = tl.max(tl.max(bad, 2), 0) > 0
    divisor = (channels * depth * ROWS * COLUMNS).to(tl.float64) * 1073741824.0
    mean = (sums.to(tl.float64) / divisor).to(tl.float32)
    tl.store(scores + task.to(tl.int64) // chunks * w + x, tl.where(nan, float("nan"), mean), mask=x < w)


@triton.jit(do_not_specialize=LENGTHS)
def budget_kernel(
    scores,
    rate,
    elbo_mean,
    budget,
    n,
    rate_step,
    STRATEGY: tl.constexpr,
    RELEASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One clip; ``rate_step`` is 0 for a rate that all share."""
    b = tl.program_id(0).to(tl.int64)
    share = tl.load(rate + b * rate_step)
    if STRATEGY > 0:
        total = tl.zeros((BLOCK,), tl.int64)
        for first in range(0, n, BLOCK):
            i = first + tl.arange(0, BLOCK)
            value = tl.load(scores + b * n + i, mask=i < n, other=0.0).to(tl.float32)
            total += _fixed(tl.where(value < -4096.0, -4096.0, value))
        mean = tl.sum(total).to(tl.float64) / (tl.full((), n, tl.float64) * 1073741824.0)
        share = share * mean / tl.load(elbo_mean).to(tl.float64)
        if STRATEGY == 2:
            share = (
                share * 4 + 6755399441055744.0 - 6755399441055744.0
            ) / 4  # 1.5 * 2^52: rounds to an integer, half to even
        share = tl.where(share != share, 1.0, tl.maximum(share, 0.0625))
    share = tl.minimum(tl.maximum(share, 0.0), 1.0)
    if RELEASED:
        rank = (1 - share.to(tl.float32)) * tl.full((), n - 1, tl.float32)  # as torch.quantile has it
        count = n - 1 - rank.to(tl.int64)
    else:
        count = tl.floor(share * tl.full((), n, tl.float64) + 0.5).to(tl.int64)
    tl.store(budget + b, tl.maximum(count, 0))


@triton.jit
def _key(score):
    """An unsigned number per score, in their order: NaN above all, -0 as 0."""
    score = score.to(tl.float32)
    bits = score.to(tl.int32, bitcast=True)
    magnitude = (bits & 0x7FFFFFFF).to(tl.uint32)
    middle = tl.full(bits.shape, 0x80000000, tl.uint32)
    key = tl.where(bits < 0, middle - magnitude, middle + magnitude)
    return tl.where(score != score, tl.full(bits.shape, 0xFFFFFFFF, tl.uint32), key)


@triton.jit(do_not_specialize=LENGTHS)
def select_few_kernel(scores, budget, keep, flag, n, STRICTLY: tl.constexpr, BLOCK: tl.constexpr):
    """As `select_kernel` for a clip of at most BLOCK tokens, whose keys stay in registers: the bound is found
    bit by bit, from the highest, by how many keys reach it."""
    b = tl.program_id(0).to(tl.int64)
    asked = tl.load(budget + b)
    if (asked < 0) | (asked > n):
        tl.atomic_or(flag, 1)
    count = tl.minimum(tl.maximum(asked, 0), n).to(tl.int32)
    rank = tl.minimum(count + 1, n) if STRICTLY else count
    at = tl.arange(0, BLOCK)
    # No score has the key 0.
    key = tl.where(at < n, _key(tl.load(scores + b * n + at, mask=at < n, other=0.0)), 0)
    bound = tl.full((), 0, tl.uint32)
    for i in range(32):
        trial = bound | (tl.full((), 1, tl.uint32) << (31 - i))
        bound = tl.where(tl.sum((key >= trial).to(tl.int32)) >= rank, trial, bound)
    if STRICTLY:
        kept = (key > bound) | (count == n)
    else:
        larger = tl.sum((key > bound).to(tl.int32))
        equal = (key == bound).to(tl.int32)
        kept = ((key > bound) | ((equal > 0) & (tl.cumsum(equal) <= count - larger))) & (count > 0)
    tl.store(keep + b * n + at, kept.to(tl.uint8), mask=at < n)


@triton.jit(do_not_specialize=LENGTHS)
def select_kernel(
    scores, budget, keep, flag, n, N_UNIT: tl.constexpr, STRICTLY: tl.constexpr, BLOCK: tl.constexpr
):
    """One clip. STRICTLY: above the (budget + 1)-th largest; else the budget largest."""
    n *= N_UNIT
    b = tl.program_id(0).to(tl.int64)
    asked = tl.load(budget + b)
    if (asked < 0) | (asked > n):
        tl.atomic_or(flag, 1)
    count = tl.minimum(tl.maximum(asked, 0), n).to(tl.int32)
    rank = tl.minimum(count + 1, n) if STRICTLY else count
    digits = tl.arange(0, 256)
    prefix = tl.full((), 0, tl.uint32)
    known = tl.full((), 0, tl.uint32)
    larger = tl.full((), 0, tl.int32)
    for i in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for first in range(0, n, BLOCK):
            at = first + tl.arange(0, BLOCK)
            key = _key(tl.load(scores + b * n + at, mask=at < n, other=0.0))
            counted = (at < n) & ((key & known) == prefix)
            each = tl.where(counted, (key >> (24 - 8 * i)) & 255, 0).to(tl.int32)
            # Before 3.4 Triton has no histogram under a mask: the others count as zeros.
            others = BLOCK - tl.sum(counted.to(tl.int32))
            histogram += tl.histogram(each, 256) - tl.where(digits == 0, others, 0)
        reached = tl.cumsum(histogram, reverse=True)  # keys with this digit or a higher one
        digit = tl.maximum(tl.sum((reached >= rank - larger).to(tl.int32)) - 1, 0)
        larger += tl.sum(tl.where(digits > digit, histogram, 0))
        prefix |= digit.to(tl.uint32) << (24 - 8 * i)
        known |= tl.full((), 255, tl.uint32) << (24 - 8 * i)
    equals = tl.where(count == 0, 0, count - larger)  # how many of those at the bound are kept
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        key = _key(tl.load(scores + b * n + at, mask=at < n, other=0.0))
        if STRICTLY:
            kept = (key > prefix) | (count == n)
        else:
            equal = ((key == prefix) & (at < n)).to(tl.int32)
            kept = ((key > prefix) & (count > 0)) | ((equal > 0) & (tl.cumsum(equal) <= equals))
            equals -= tl.sum(equal)
        tl.store(keep + b * n + at, kept.to(tl.uint8), mask=at < n)


@triton.jit(do_not_specialize=LENGTHS)
def count_kernel(
    keep, before, totals, n, blocks, N_UNIT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr
):
    """One clip: how many tokens are kept before each block of BLOCK positions, and in all."""
    n *= N_UNIT
    b = tl.program_id(0).to(tl.int64)
    found = tl.full((), 0, tl.int32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        counts = tl.sum((tl.load(keep + b * n + at, mask=at < n, other=0) != 0).to(tl.int32), 1)
        tl.store(before + b * blocks + block, found + tl.cumsum(counts) - counts, mask=block < blocks)
        found += tl.sum(counts)
    tl.store(totals + b, found)


@triton.jit
def _tokens_of(totals, clips, CLIPS: tl.constexpr):
    """How many tokens the first clips have."""
    sums = tl.zeros((CLIPS,), tl.int64)
    for first in range(0, clips, CLIPS):
        clip = first + tl.arange(0, CLIPS)
        sums += tl.load(totals + clip, mask=clip < clips, other=0)
    return tl.sum(sums)


@triton.jit
def _rows(keep, before, totals, b, block, n, blocks, BLOCK: tl.constexpr, CLIPS: tl.constexpr):
    """The positions of a block, which of them are kept, and the row of each of these."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    kept = tl.load(keep + b * n + at, mask=at < n, other=0) != 0
    row = (
        _tokens_of(totals, b, CLIPS) + tl.load(before + b * blocks + block) + tl.cumsum(kept.to(tl.int32)) - 1
    )
    return at, kept, row


@triton.jit(do_not_specialize=LENGTHS)
def pack_kernel(
    tokens,
    keep,
    before,
    totals,
    values,
    indices,
    cu_seqlens,
    flag,
    thresholds,
    basis,
    tb,
    tc,
    tn,
    n,
    blocks,
    clips,
    channels,
    capacity,
    pitch,
    UNIT: tl.constexpr,
    N_UNIT: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    NEAR: tl.constexpr,
    FSQ: tl.constexpr,
    PLANAR: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Programs (clips * blocks + empty blocks, blocks of channels). FSQ: the value is the index of the
    token's codes. PLANAR: positions are adjacent; then all are read, since a mask between neighbors would
    split the loads and save hardly a sector. Strides are counted in UNIT, except that which is 1: of channels
    (NEAR 1), of positions (2) or none (0)."""
    n *= N_UNIT
    channels *= CHANNEL_UNIT
    task = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    if task < clips * blocks:
        b = (task // blocks).to(tl.int64)
        block = task % blocks
        at, kept, row = _rows(keep, before, totals, b, block, n, blocks, BLOCK, CLIPS)
        kept &= row < capacity
        wanted = at < n if PLANAR else kept
        place, channel = at.to(tl.int64)[:, None], c.to(tl.int64)[None, :]
        if NEAR != 2:
            place = place * tn * UNIT
        if NEAR != 1:
            channel = channel * tc * UNIT
        x = tl.load(
            tokens + b * tb * UNIT + place + channel,
            mask=wanted[:, None] & (c < channels)[None, :],
            other=0,
        )
        if FSQ:
            x = x.to(tl.float32)
            level = tl.zeros((BLOCK, BLOCK_C), tl.int32)
            for k in range(0, pitch):
                threshold = tl.load(thresholds + c * pitch + k, mask=c < channels, other=float("nan"))
                level += (x >= threshold[None, :]).to(tl.int32)
            index = tl.sum(level * tl.load(basis + c, mask=c < channels, other=0)[None, :], 1)
            nan = tl.max((x != x).to(tl.int32), 1) > 0
            tl.store(values + row, tl.where(nan, -1, index), mask=kept)
        else:
            tl.store(
                values + row[:, None] * channels + c[None, :], x, mask=kept[:, None] & (c < channels)[None, :]
            )
        if tl.program_id(1) == 0:
            tl.store(indices + row, at, mask=kept)
            if block == 0:
                tl.store(cu_seqlens + b, tl.minimum(_tokens_of(totals, b, CLIPS), capacity).to(tl.int32))
                if b == 0:
                    total = _tokens_of(totals, clips, CLIPS)
                    tl.store(cu_seqlens + clips, tl.minimum(total, capacity).to(tl.int32))
                    if total > capacity:
                        tl.atomic_or(flag, 2)
    else:  # rows that no token takes
        row = (task - clips * blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        empty = (row >= _tokens_of(totals, clips, CLIPS)) & (row < capacity)
        if FSQ:
            tl.store(values + row, tl.zeros((BLOCK,), tl.int32), mask=empty)
        else:
            tl.store(
                values + row[:, None] * channels + c[None, :],
                tl.zeros((BLOCK, BLOCK_C), values.dtype.element_ty),
                mask=empty[:, None] & (c < channels)[None, :],
            )
        if tl.program_id(1) == 0:
            tl.store(indices + row, tl.full((BLOCK,), -1, tl.int32), mask=empty)


@triton.jit(do_not_specialize=LENGTHS)
def unpack_kernel(
    values,
    keep,
    before,
    totals,
    dense,
    flag,
    fill,
    n,
    blocks,
    clips,
    channels,
    rows,
    CHANNEL_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CLIPS: tl.constexpr,
):
    """Programs (clips * blocks, blocks of channels), each of a block of positions."""
    channels *= CHANNEL_UNIT
    task = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = (task // blocks).to(tl.int64)
    at, kept, row = _rows(keep, before, totals, b, task % blocks, n, blocks, BLOCK, CLIPS)
    inside = (c < channels)[None, :]
    x = tl.load(
        values + row[:, None] * channels + c[None, :],
        mask=(kept & (row < rows))[:, None] & inside,
        other=fill,
    )
    tl.store(dense + (b * n + at)[:, None] * channels + c[None, :], x, mask=(at < n)[:, None] & inside)
    if (task == 0) & (tl.program_id(1) == 0):
        if _tokens_of(totals, clips, CLIPS) > rows:
            tl.atomic_or(flag, 4)


# ---- launchers ---------------------------------------------------------------------------------------------


def used_strides(x: Tensor) -> list[int]:
    """0 where there is but one element to step over."""
    return [0 if n == 1 else s for n, s in zip(x.shape, x.stride())]


def router_scores(video: Tensor, reconstruction: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """float32 (B, t, h, w) of two float32, bfloat16 or float16 videos (B, C, T, H, W) with any strides."""
    b, channels, frames, height, width = video.shape
    t, h, w = 1 + (frames - 1) // grid[0], height // grid[1], width // grid[2]
    scores = video.new_empty(b, t, h, w, dtype=torch.float32)
    if scores.numel() == 0:
        return scores
    strides, columns = [used_strides(v) for v in (video, reconstruction)], grid[2]
    if all(s[1] == 1 and s[4] == channels for s in strides):  # channels innermost: they count as columns
        for s in strides:
            s[1], s[4] = 0, 1
        columns, channels = columns * channels, 1
    adjacent = all(s[4] == 1 for s in strides)
    unit = unit_of(*(n for s in strides for n in (s[:4] if adjacent else s)))
    strides = [[n // unit for n in s] for s in strides]
    block_columns = min(triton.next_power_of_2(columns), 128)
    block_rows = min(triton.next_power_of_2(grid[1]), 8)
    cells = max(1, min(triton.next_power_of_2(w), 2048 // block_columns // block_rows))
    if b * t * h * triton.cdiv(w, cells) < ENOUGH:
        cells = min(cells, 8)
    cells, warps = tuned_tile(
        "token_packing",
        video,
        (cells, 4),
        "scores",
        video.dtype,
        f"cells {block_rows}x{block_columns}",
        power_of_two(video.numel()),
    )
    with on_device_of(video):
        scores_kernel[(b * t * h * triton.cdiv(w, cells),)](
            video,
            reconstruction,
            scores,
            *strides[0],
            *strides[1],
            channels,
            grid[0],
            t,
            h,
            w,
            grid[1],
            columns,
            block_rows,
            cells,
            block_columns,
            unit,
            adjacent,
            num_warps=warps,
        )
    return scores


def token_budget(
    scores: Tensor, rate: Tensor, strategy: str, elbo_mean: Tensor | None, released: bool
) -> Tensor:
    """int64 (B,) for scores (B, n), contiguous, and a float64 rate of one or B elements."""
    budget = torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)
    if budget.numel():
        with on_device_of(scores):
            budget_kernel[(scores.shape[0],)](
                scores,
                rate,
                rate if elbo_mean is None else elbo_mean,
                budget,
                scores.shape[1],
                int(rate.numel() > 1),
                STRATEGIES[strategy],
                released,
                2048,
                enable_fp_fusion=False,
            )
    return budget


def select_tokens(scores: Tensor, budget: Tensor, strictly: bool, flag: Tensor) -> Tensor:
    """bool (B, n) for scores (B, n), contiguous; a budget out of range sets BUDGET in ``flag``."""
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if keep.numel() and scores.shape[1] <= FEW:
        block = 1024 if scores.shape[1] <= 1024 else FEW
        (block, warps) = tuning.chosen(
            "token_packing",
            scores.device,
            (block, max(4, block // 512)),
            tiles_few,
            "select few",
            scores.dtype,
            power_of_two(scores.shape[1]),
        )
        with on_device_of(scores):
            select_few_kernel[(scores.shape[0],)](
                scores,
                budget,
                keep.view(torch.uint8),
                flag,
                scores.shape[1],
                strictly,
                block,
                num_warps=warps,
            )
    elif keep.numel():
        unit = unit_of(scores.shape[1])
        block = SELECT_BLOCK
        block, warps = tuned_tile(
            "token_packing",
            scores,
            (block, SELECT_WARPS),
            "select",
            scores.dtype,
            power_of_two(scores.shape[1]),
        )
        with on_device_of(scores):
            select_kernel[(scores.shape[0],)](
                scores,
                budget,
                keep.view(torch.uint8),
                flag,
                scores.shape[1] // unit,
                unit,
                strictly,
                # Histograms of fewer values than threads count some twice in Triton before 3.4.
                max(block, 32 * warps),
                num_warps=warps,
            )
    return keep


def tiles_few(tile: tuple[int, int]) -> list[tuple[int, int]]:
    """What a tuning table may choose for `select_few_kernel`, whose block holds the clip: more warps."""
    block, warps = tile
    return [(block, n) for n in (warps, 2 * warps) if n <= 32]


def tiles(channels: int, planar: bool) -> tuple[int, int]:
    """Positions and channels of one program. Planar tokens are read along positions and need longer runs of
    them."""
    block_c = min(triton.next_power_of_2(max(channels, 1)), 128 if planar else 256)
    return max(32, min(8192 // block_c, 1024)), block_c


def _tuned(kernel: str, x: Tensor, block: int, block_c: int, planar: bool, n: int) -> tuple[int, int]:
    return tuned_tile(
        "token_packing",
        x,
        (block, 4 if block * block_c < 8192 else 8),
        kernel,
        x.dtype,
        f"channels {block_c}",
        "planar" if planar else "channels last",
        power_of_two(n),
    )


def _count(keep: Tensor, block: int) -> tuple[Tensor, Tensor, int]:
    clips, n = keep.shape
    blocks = triton.cdiv(n, block)
    before = torch.empty(clips, blocks, dtype=torch.int32, device=keep.device)
    totals = torch.empty(clips, dtype=torch.int32, device=keep.device)
    unit = unit_of(n)
    count_kernel[(clips,)](keep, before, totals, n // unit, blocks, unit, block, max(1, 4096 // block))
    return before, totals, blocks


def pack_tokens(
    tokens: Tensor,
    keep: Tensor,
    capacity: int | None,
    flag: Tensor,
    thresholds: Tensor | None = None,
    basis: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, C), positions (N,) and cu_seqlens for tokens (B, C, n), any strides, and keep uint8 (B, n),
    contiguous.

    Waits for the device where ``capacity`` is None; else more tokens than that set CAPACITY in ``flag``. With
    ``thresholds`` (C, pitch) and ``basis`` (C,) of FSQ values are its indices, int32 (N,).
    """
    clips, channels, n = tokens.shape
    device, fsq = tokens.device, thresholds is not None
    planar = tokens.stride(2) == 1 and channels > 1
    block, block_c = tiles(channels, planar)
    if fsq:
        block_c = triton.next_power_of_2(channels)
    block, warps = _tuned("pack fsq" if fsq else "pack", tokens, block, block_c, planar, n)
    cu_seqlens = (
        torch.zeros(clips + 1, dtype=torch.int32, device=device)
        if keep.numel() == 0
        else torch.empty(clips + 1, dtype=torch.int32, device=device)
    )
    with on_device_of(tokens):
        if keep.numel():
            before, totals, blocks = _count(keep, block)
        else:
            before = totals = cu_seqlens
            clips = blocks = 0
        rows = int(totals[:clips].sum()) if capacity is None else capacity
        values = torch.empty(
            (rows,) if fsq else (rows, channels), dtype=torch.int32 if fsq else tokens.dtype, device=device
        )
        indices = torch.empty(rows, dtype=torch.int32, device=device)
        strides, channel_unit = used_strides(tokens), unit_of(channels)
        near = 2 if strides[2] == 1 and (planar or channels == 1) else 1 if strides[1] == 1 else 0
        if near:
            strides[near] = 0  # not read
        unit = unit_of(*strides)
        n_unit = unit_of(n) if near == 2 else 1
        programs = clips * blocks + (0 if capacity is None else triton.cdiv(capacity, block))
        if programs:
            pack_kernel[(programs, max(1, triton.cdiv(channels, block_c)))](
                tokens,
                keep,
                before,
                totals,
                values,
                indices,
                cu_seqlens,
                flag,
                thresholds if fsq else values,
                basis if fsq else values,
                *(s // unit for s in strides),
                n // n_unit,
                blocks,
                clips,
                channels // channel_unit,
                rows,
                thresholds.shape[1] if fsq else 0,
                unit,
                n_unit,
                channel_unit,
                near,
                fsq,
                planar,
                block,
                block_c,
                CLIPS,
                num_warps=warps,
            )
    return values, indices, cu_seqlens


def unpack_tokens(values: Tensor, mask: Tensor, fill: int, dense: Tensor, flag: Tensor) -> None:
    """Writes dense (B, C, n), channels innermost, from values (N, C), contiguous, both of one integer dtype,
    and mask uint8 (B, n), contiguous. A mask that keeps more than N sets ROWS in ``flag``."""
    if dense.numel() == 0:
        return
    clips, channels, n = dense.shape
    block, block_c = tiles(channels, planar=False)
    block, warps = _tuned("unpack", values, block, block_c, False, n)
    with on_device_of(values):
        before, totals, blocks = _count(mask, block)
        unpack_kernel[(clips * blocks, triton.cdiv(channels, block_c))](
            values,
            mask,
            before,
            totals,
            dense,
            flag,
            fill,
            n,
            blocks,
            clips,
            channels // unit_of(channels),
            len(values),
            unit_of(channels),
            block,
            block_c,
            CLIPS,
            num_warps=warps,
        )
