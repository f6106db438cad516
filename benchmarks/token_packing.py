"""``token_packing`` against PyTorch: InfoTok's router on 33x256x256 and 81x240x432, and packing and unpacking its tokens.

Peers of *router* (scores, budget and mask): the eager chain of InfoTok's code, with a sort for its quantile, and ``torch.compile``
of that. Of *pack*: ``x[mask]`` on the channels-last view, which is the eager way, and ``index_select`` with positions that are
already known. Of *unpack*: writing into zeros through the mask, and ``index_copy`` into zeros with such positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Settings, Trial, compiled
from vtok_fast.ops.token_packing import PackedTokens, pack_tokens, router_scores, select_tokens, token_budget, unpack_tokens
from vtok_fast.reference import token_packing as reference


@dataclass(frozen=True)
class Case:
    """``size`` is (clips, C, T, H, W) of the pixels for the router, else of the tokens; C = 0: the indices of FSQ."""

    kind: str
    size: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    planar: bool = False
    compile: bool = False

    def __str__(self) -> str:
        return (f"{self.kind} {'x'.join(map(str, self.size))} {str(self.dtype).removeprefix('torch.')}"
                f"{' planar' if self.planar else ''}")


_CASES = [
    Case("router", (1, 3, 33, 256, 256), compile=True),
    Case("router", (1, 3, 33, 256, 256), torch.bfloat16),
    Case("router", (1, 3, 81, 240, 432), torch.bfloat16),
    *(Case(kind, size, dtype, planar)
      for kind in ("pack", "unpack")
      for size, dtype, planar in (((4, 256, 9, 32, 32), torch.float32, False), ((4, 256, 9, 32, 32), torch.bfloat16, False),
                                  ((4, 256, 9, 32, 32), torch.float32, True), ((16, 6, 9, 32, 32), torch.float32, False),
                                  ((64, 0, 9, 32, 32), torch.int32, False))
      if kind == "pack" or not planar),
]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [Case(c.kind, (1, *c.size[1:2], *((5, 32, 32) if c.kind == "router" else (2, 8, 8))), c.dtype)
                for c in _CASES[:2] + _CASES[3:4] + _CASES[-1:]]
    return _CASES


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
    torch.manual_seed(0)
    return _router(case) if case.kind == "router" else _moving(case)


def _router(case: Case) -> Trial:
    video = torch.rand(case.size).mul(2).sub(1).to(case.dtype)
    other = (video + 0.1 * torch.randn(case.size)).to(case.dtype)
    eager, ours = partial(eager_router, video, other), partial(our_router, video, other)
    candidates, missing = [Candidate("eager", eager, "eager")], {}
    if case.compile:
        fast, why = compiled(eager)
        if fast is None:
            missing["torch.compile(eager)"] = why
        else:
            candidates.append(Candidate("torch.compile(eager)", fast))
    candidates.append(Candidate("vtok_fast", ours, "ours"))
    scores = reference.router_scores(video, other, (4, 8, 8))
    want = reference.select_tokens(scores, token_budget(scores, 0.5))
    facts = {"megabytes": 2 * video.numel() * video.element_size() / 1e6, "tokens": want.numel()}
    wrong = None if torch.equal(ours(), want) else "another mask than the reference"
    return Trial(str(case), case.kind, candidates, facts, missing, wrong)


def _moving(case: Case) -> Trial:
    clips, channels, *grid = case.size
    if channels:
        tokens = torch.randn(clips, *grid, channels).to(case.dtype).movedim(-1, 1)
        tokens = tokens.contiguous() if case.planar else tokens
        last = tokens.movedim(1, -1)
    else:
        last = tokens = torch.randint(64000, (clips, *grid), dtype=case.dtype)
    keep = select_tokens(torch.rand(clips, *grid), math.prod(grid) // 2)
    packed, rows = pack_tokens(tokens, keep), keep.flatten().nonzero().flatten()
    if case.kind == "pack":
        eager, want = partial(lambda x, mask: x[mask], last, keep), last[keep]
        peer, ours = Candidate("index_select", partial(select_pack, last, rows)), partial(_values, tokens, keep)
    else:
        eager, want = partial(eager_unpack, packed.values, keep), eager_unpack(packed.values, keep)
        peer, ours = Candidate("index_copy", partial(copy_unpack, packed.values, keep, rows)), partial(_last, packed)
    size = packed.values.numel() * packed.values.element_size()
    moved = 2 * size if case.kind == "pack" else size + last.numel() * last.element_size()
    name = "x[mask]" if case.kind == "pack" else "zeros[mask] = x"
    candidates = [Candidate(name, eager, "eager"), peer, Candidate("vtok_fast", ours, "ours")]
    wrong = None if torch.equal(ours(), want) else "other values than PyTorch's"
    return Trial(str(case), case.kind, candidates, {"megabytes": moved / 1e6, "tokens": keep.numel()}, {}, wrong)


def _values(tokens: Tensor, keep: Tensor) -> Tensor:
    return pack_tokens(tokens, keep).values


def _last(packed: PackedTokens) -> Tensor:
    dense = unpack_tokens(packed)
    return dense if packed.values.dim() == 1 else dense.movedim(1, -1)


def test_token_packing(case: Case, run_trial) -> None:
    run_trial(case)
