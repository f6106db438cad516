"""``token_packing`` against PyTorch: InfoTok's router on 33x256x256 and 81x240x432, and packing and unpacking
its tokens.

Peers of *router* (scores, budget and mask): the eager chain of InfoTok's code, with a sort for its quantile,
and ``torch.compile`` of that. Of *pack*: ``x[mask]`` on the channels-last view, which is the eager way, and
``index_select`` with
    positions that are
already known. Of *unpack*: writing into zeros through the mask, and ``index_copy`` into zeros with such
    positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, dtype_name, with_compiled
from vtok_fast.bench.own import Own
from vtok_fast.bench.pairs import undone
from vtok_fast.ops.token_packing import (
    PackedTokens,
    pack_tokens,
    router_scores,
    select_tokens,
    token_budget,
    unpack_tokens,
)
from vtok_fast.reference import token_packing as reference

PEERS = (
    "eager (sort and quantile; x[mask]; zeros[mask] = x); torch.compile(eager) for a router; "
    "index_select or index_copy"
)


@dataclass(frozen=True)
class Case:
    """``size`` is (clips, C, T, H, W) of the pixels for the router, else of the tokens; C = 0: the indices of
    FSQ."""

    kind: str
    size: tuple[int, int, int, int, int]
    dtype: torch.dtype | None = torch.float32
    planar: bool = False
    compile: bool = False
    model: str = "infotok"

    def __str__(self) -> str:
        dtype = "" if self.dtype is None else f" {dtype_name(self.dtype)}"
        own = "own " if self.model == "own" else ""
        return f"{own}{self.kind} {'x'.join(map(str, self.size))}{dtype}{' planar' if self.planar else ''}"


_CASES = [
    Case("router", (1, 3, 33, 256, 256), compile=True),
    Case("router", (1, 3, 33, 256, 256), torch.bfloat16),
    Case("router", (1, 3, 81, 240, 432), torch.bfloat16),
    *(
        Case(kind, size, dtype, planar)
        for kind in ("pack", "unpack")
        for size, dtype, planar in (
            ((4, 256, 9, 32, 32), torch.float32, False),
            ((4, 256, 9, 32, 32), torch.bfloat16, False),
            ((4, 256, 9, 32, 32), torch.float32, True),
            ((16, 6, 9, 32, 32), torch.float32, False),
            ((64, 0, 9, 32, 32), torch.int32, False),
        )
        if kind == "pack" or not planar
    ),
]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [
            Case(c.kind, (1, *c.size[1:2], *((5, 32, 32) if c.kind == "router" else (2, 8, 8))), c.dtype)
            for c in _CASES[:2] + _CASES[3:4] + _CASES[-1:]
        ]
    return _CASES


def own(wish: Own) -> Case:
    wish.only("token_packing", "kind")
    kind, size = wish.one_of("kind", ("router", "pack", "unpack"), "pack"), wish.sizes("B,C,T,H,W")
    if kind == "router" and (size[2] % 4 != 1 or size[3] % 8 or size[4] % 8):
        raise ValueError(
            f"shape={','.join(map(str, size))}: a router needs 1 + 4n frames, and sides that are multiples "
            f"of 8"
        )
    return Case(kind, size, None, compile=wish.compile, model="own")


def eager_router(video: Tensor, reconstruction: Tensor) -> Tensor:
    """InfoTok: the mean error of each token's pixels, frame 0 alone, and what lies above the quantile."""
    error = (video - reconstruction).abs().mean(1)
    scores = torch.cat([error[:, :1], error[:, 1:].unflatten(1, (-1, 4)).mean(2)], 1)
    scores = scores.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5))
    flat = scores.flatten(1)
    bound = flat.sort(1).values[:, flat.shape[1] // 2 - 1]
    return scores > bound.view(-1, 1, 1, 1)


def our_router(video: Tensor, reconstruction: Tensor) -> Tensor:
    scores = router_scores(video, reconstruction)
    return select_tokens(scores, token_budget(scores, 0.5))


def select_pack(last: Tensor, rows: Tensor) -> Tensor:
    """(Where the channels are not innermost, this copies all tokens first.)"""
    return last.flatten(0, 3).index_select(0, rows)


def eager_unpack(values: Tensor, mask: Tensor) -> Tensor:
    dense = values.new_zeros(*mask.shape, *values.shape[1:])
    dense[mask] = values
    return dense


def copy_unpack(values: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    dense = values.new_zeros(mask.numel(), *values.shape[1:])
    return dense.index_copy_(0, rows, values)


def build(case: Case, settings: Settings) -> Trial:
    """In the case's own dtype, or for shapes of the user's own in that of the settings."""
    torch.manual_seed(0)
    case = replace(case, dtype=case.dtype or settings.working_dtype)
    return (_router if case.kind == "router" else _moving)(case, settings)


def _router(case: Case, settings: Settings) -> Trial:
    device = settings.device
    video = torch.rand(case.size, device=device).mul(2).sub(1).to(case.dtype)
    other = (video + 0.1 * torch.randn(case.size, device=device)).to(case.dtype)
    eager = Candidate("eager", eager_router, "eager", inputs=(video, other))
    ours = Candidate("vtok_fast", our_router, "ours", inputs=(video, other))
    found, missing = with_compiled([eager], settings) if case.compile else ([], {})
    scores = reference.router_scores(video, other, (4, 8, 8))
    want = reference.select_tokens(scores, token_budget(scores, 0.5))
    facts = {
        "megabytes": 2 * video.numel() * video.element_size() / 1e6,
        "tokens": want.numel(),
        "dtype": dtype_name(case.dtype),
        "backend": backend_of(ours.call),
    }
    wrong = None if torch.equal(ours.call(), want) else "another mask than the reference"
    variants = undone("token_packing", ours, settings)
    return Trial(str(case), case.kind, [eager, *found, ours, *variants], facts, missing, wrong)


def _moving(case: Case, settings: Settings) -> Trial:
    (clips, channels, *grid), device = case.size, settings.device
    if channels:
        tokens = torch.randn(clips, *grid, channels, device=device).to(case.dtype).movedim(-1, 1)
        tokens = tokens.contiguous() if case.planar else tokens
        last = tokens.movedim(1, -1)
    else:
        last = tokens = torch.randint(64000, (clips, *grid), dtype=case.dtype, device=device)
    keep = select_tokens(torch.rand(clips, *grid, device=device), math.prod(grid) // 2)
    # A budget tells how many tokens are kept: on a GPU nothing then waits for the number.
    capacity = None if keep.is_cpu else clips * (math.prod(grid) // 2)
    packed, rows = pack_tokens(tokens, keep, capacity=capacity), keep.flatten().nonzero().flatten()
    values = packed.values
    if case.kind == "pack":
        want = last[keep]
        eager = Candidate("x[mask]", torch.Tensor.__getitem__, "eager", inputs=(last, keep))
        peer = Candidate("index_select", select_pack, inputs=(last, rows))
        ours = Candidate("vtok_fast", partial(_values, capacity=capacity), "ours", inputs=(tokens, keep))
    else:
        want = eager_unpack(values, keep)
        eager = Candidate("zeros[mask] = x", eager_unpack, "eager", inputs=(values, keep))
        peer = Candidate("index_copy", copy_unpack, inputs=(values, keep, rows))
        ours = Candidate("vtok_fast", _last, "ours", inputs=(values, packed.indices, packed.cu_seqlens, keep))
    size = values.numel() * values.element_size()
    moved = 2 * size if case.kind == "pack" else size + last.numel() * last.element_size()
    wrong = None if torch.equal(ours.call(), want) else "other values than PyTorch's"
    facts = {
        "megabytes": moved / 1e6,
        "tokens": keep.numel(),
        "dtype": dtype_name(case.dtype),
        "backend": backend_of(ours.call),
    }
    return Trial(str(case), case.kind, [eager, peer, ours], facts, {}, wrong)


def _values(tokens: Tensor, keep: Tensor, capacity: int | None) -> Tensor:
    return pack_tokens(tokens, keep, capacity=capacity).values


def _last(values: Tensor, indices: Tensor, cu_seqlens: Tensor, keep: Tensor) -> Tensor:
    dense = unpack_tokens(PackedTokens(values, indices, cu_seqlens, keep))
    return dense if values.dim() == 1 else dense.movedim(1, -1)
