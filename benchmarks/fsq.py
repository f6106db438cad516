"""``fsq`` against the chains that people run, and against a plain copy of the same bytes.

Peers: *eager*, the quantiser of VidTok as published: to channels-last, tanh bound, round, index as a sum of products, back;
*vector-quantize style*, the same with the constants made anew in each call, and the library itself where it is installed;
``torch.compile`` of the first. The copy is a floor, no peer: it reads the latent and writes codes and indices.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Candidate, Settings, Trial, compiled
from vtok_fast.ops.fsq import fsq_quantize

EPS = 1e-3


@dataclass(frozen=True)
class Case:
    """``size`` is (T, H, W) of the latent; ``layout`` ``planar`` (NCDHW) or ``channels last``. ``group`` is ``large``, where bytes
    decide, or ``latent``, that of a 17x256x256 clip, where the cost of a call does."""

    group: str
    levels: tuple[int, ...]
    size: tuple[int, int, int]
    layout: str
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.group} {len(self.levels)}x{'x'.join(map(str, self.size))} {self.layout}"


def cases(settings: Settings) -> list[Case]:
    six, large = (8, 8, 8, 5, 5, 5), (4, 128, 128) if settings.quick else (16, 256, 256)
    return [Case("large", six, large, "planar", not settings.quick), Case("large", six, large, "channels last"),
            Case("latent", (8,) * 5, (5, 32, 32), "planar"),
            Case("latent", (8,) * 5, (5, 32, 32), "channels last")]


class Official:
    """The steps of VidTok's quantiser (github.com/microsoft/VidTok) at inference. ``levels`` and ``basis`` are its buffers; the
    other constants it makes in each call. They are of the type of z, so that a float64 z gives the definition of the index."""

    def __init__(self, levels: tuple[int, ...]):
        self.levels = torch.tensor(levels, dtype=torch.int32)
        self.basis = torch.cumprod(torch.tensor((1, *levels[:-1])), 0, dtype=torch.int32)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        b, c, *space = z.shape
        z = z.movedim(1, -1).reshape(b, -1, 1, c)
        half = (self.levels - 1).to(z.dtype) * (1 + EPS) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0).to(z.dtype)
        bounded = (z + (offset / half).atanh()).tanh() * half - offset
        width = self.levels // 2
        codes = (bounded + (bounded.round() - bounded).detach()) / width
        indices = ((codes * width + width) * self.basis).sum(-1).to(torch.int32)
        return codes.reshape(b, *space, c).movedim(-1, 1), indices.reshape(b, *space)


def vector_quantize_style(z: Tensor, levels: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The same steps with the constants made in the call, in float32, the index rounded, as vector-quantize-pytorch does them."""
    official = Official(levels)
    codes, _ = official(z.float())
    width = official.levels // 2
    indices = ((codes.movedim(1, -1) * width + width) * official.basis).sum(-1).round().to(torch.int32)
    return codes.to(z.dtype), indices


def build(case: Case, settings: Settings) -> Trial:
    torch.manual_seed(0)
    z = torch.randn(1, len(case.levels), *case.size) * 1.5
    if case.layout == "channels last":
        z = z.contiguous(memory_format=torch.channels_last_3d)
    official = Official(case.levels)
    candidates = [Candidate("eager", partial(official, z), "eager"),
                  Candidate("vector-quantize style", partial(vector_quantize_style, z, case.levels))]
    missing = {}
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError as error:
        missing["vector-quantize-pytorch"] = f"{error}"
    else:
        candidates.append(Candidate("vector-quantize-pytorch", partial(FSQ(list(case.levels)).eval(), z)))
    if case.compile:
        fast, why = compiled(official, z)
        if fast is None:
            missing["torch.compile(eager)"] = why
        else:
            candidates.append(Candidate("torch.compile(eager)", partial(fast, z)))
    codes, indices = torch.empty_like(z), torch.empty(1, *case.size, dtype=torch.int32)

    def copy() -> None:
        codes.copy_(z)
        indices.fill_(0)

    ours = partial(fsq_quantize, z, case.levels)
    candidates += [Candidate("plain copy", copy, "floor"), Candidate("vtok_fast", ours, "ours")]
    # The definition: the formula in float64. In float32 a value next to a threshold may fall on its other side.
    exact, mine, theirs = Official(case.levels)(z.double())[1], ours().indices, official(z)[1]
    facts = {"tokens": indices.numel(), "megabytes": (2 * z.numel() * 4 + indices.numel() * 4) / 1e6,
             "differ_from_float64": int((mine != exact).sum()), "eager_differ_from_float64": int((theirs != exact).sum())}
    return Trial(str(case), case.group, candidates, facts, missing,
                 f"{facts['differ_from_float64']} indices differ from float64's" if facts["differ_from_float64"] else None)


def test_fsq(case: Case, run_trial) -> None:
    run_trial(case)
