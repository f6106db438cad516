"""``fsq`` against the chains that people run, and against a plain copy of the same bytes.

Peers: *eager*, the quantizer of VidTok as published: to channels-last, tanh bound, round, index as a sum of
products, back; *vector-quantize style*, the same with the constants made anew in each call, and the library
itself where it is installed; ``torch.compile`` of the first. The copy is a floor, no peer: it reads the
latent and writes codes and indices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, dtype_name, with_compiled
from vtok_fast.bench.own import Own
from vtok_fast.ops.fsq import fsq_quantize

EPS = 1e-3
PEERS = "eager; vector-quantize style; vector-quantize-pytorch; torch.compile(eager); plain copy (floor)"


@dataclass(frozen=True)
class Case:
    """``size`` is (T, H, W) of the latents of ``batch`` clips; ``layout`` ``planar`` (NCDHW) or ``channels
    last``. ``group`` is ``large``, where bytes decide, or ``latent``, that of a 17x256x256 clip, where the
    cost of a call does."""

    group: str
    levels: tuple[int, ...]
    size: tuple[int, int, int]
    layout: str
    compile: bool = False
    batch: int = 1
    dtype: torch.dtype | None = None  # None: that of the settings

    @property
    def model(self) -> str:
        return "vidtok" if set(self.levels) == {8} else "cosmos"

    def __str__(self) -> str:
        clips = "" if self.batch == 1 else f"{self.batch}x"
        return f"{self.group} {clips}{len(self.levels)}x{'x'.join(map(str, self.size))} {self.layout}"


def cases(settings: Settings) -> list[Case]:
    """In float32, as all of these compute in, unless the settings ask for another dtype."""
    six, large = (8, 8, 8, 5, 5, 5), (4, 128, 128) if settings.quick else (16, 256, 256)
    if settings.on_gpu and not settings.quick:
        large = (64, 512, 512)
    chosen = [
        Case("large", six, large, "planar", not settings.quick),
        Case("large", six, large, "channels last"),
        Case("latent", (8,) * 5, (5, 32, 32), "planar"),
        Case("latent", (8,) * 5, (5, 32, 32), "channels last"),
    ]
    return [replace(case, dtype=settings.dtype or torch.float32) for case in chosen]


def own(wish: Own) -> Case:
    wish.only("fsq", "levels", "kind")
    batch, channels, *size = wish.sizes("B,C,T,H,W")
    levels = wish.levels or (8,) * channels
    if len(levels) != channels:
        raise ValueError(f"levels={','.join(map(str, levels))}: expected one for each of {channels} channels")
    return Case(
        "own",
        levels,
        tuple(size),
        wish.one_of("kind", ("planar", "channels last"), "planar"),
        wish.compile,
        batch,
    )


class Official:
    """The steps of VidTok's quantizer (github.com/microsoft/VidTok) at inference. ``levels`` and ``basis``
    are its buffers; the other constants it makes in each call. They are of the type of z, so that a float64 z
    gives the definition of the index."""

    def __init__(self, levels: tuple[int, ...], device: torch.device | str = "cpu"):
        self.levels = torch.tensor(levels, dtype=torch.int32, device=device)
        self.basis = torch.cumprod(torch.tensor((1, *levels[:-1]), device=device), 0, dtype=torch.int32)

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
    """The same steps with the constants made in the call, in float32, the index rounded, as
    vector-quantize-pytorch does them."""
    official = Official(levels, z.device)
    codes, _ = official(z.float())
    width = official.levels // 2
    indices = ((codes.movedim(1, -1) * width + width) * official.basis).sum(-1).round().to(torch.int32)
    return codes.to(z.dtype), indices


def copy(codes: Tensor, indices: Tensor, z: Tensor) -> None:
    codes.copy_(z)
    indices.fill_(0)


def build(case: Case, settings: Settings) -> Trial:
    torch.manual_seed(0)
    dtype = case.dtype or settings.working_dtype
    z = (torch.randn(case.batch, len(case.levels), *case.size, device=settings.device) * 1.5).to(dtype)
    if case.layout == "channels last":
        z = z.contiguous(memory_format=torch.channels_last_3d)
    official = Official(case.levels, z.device)
    eager = Candidate("eager", official, "eager", inputs=(z,))
    candidates, missing = (
        [
            eager,
            Candidate(
                "vector-quantize style", partial(vector_quantize_style, levels=case.levels), inputs=(z,)
            ),
        ],
        {},
    )
    try:
        from vector_quantize_pytorch import FSQ
    except ImportError as error:
        missing["vector-quantize-pytorch"] = f"{error}"
    else:
        candidates.append(
            Candidate("vector-quantize-pytorch", FSQ(list(case.levels)).eval().to(z.device), inputs=(z,))
        )
    if case.compile:
        found, absent = with_compiled([eager], settings)
        candidates, missing = candidates + found, missing | absent
    indices = torch.empty(case.batch, *case.size, dtype=torch.int32, device=z.device)
    ours = Candidate("vtok_fast", partial(fsq_quantize, levels=case.levels), "ours", inputs=(z,))
    candidates += [Candidate("plain copy", copy, "floor", inputs=(torch.empty_like(z), indices, z)), ours]
    # The definition: the formula in float64. In float32 a value next to a threshold may fall on its other
    # side.
    exact, mine, theirs = official(z.double())[1], ours.call().indices, official(z)[1]
    facts = {
        "tokens": indices.numel(),
        "megabytes": (2 * z.numel() * z.element_size() + indices.numel() * 4) / 1e6,
        "dtype": dtype_name(dtype),
        "backend": backend_of(ours.call),
        "differ_from_float64": int((mine != exact).sum()),
        "eager_differ_from_float64": int((theirs != exact).sum()),
    }
    return Trial(
        str(case),
        case.group,
        candidates,
        facts,
        missing,
        f"{facts['differ_from_float64']} indices differ from float64's"
        if facts["differ_from_float64"]
        else None,
    )
