"""``norm_act`` against PyTorch: norm and SiLU on the activations of VidTok, Wan 2.1 and Cosmos.

Peers: *eager*, the chain that the model ships, NCDHW, with its permutes and with SiLU as x * sigmoid(x) where
the model writes it so; *best PyTorch*, the norm's own operator on channels-last data and F.silu; for the
first case of each kind ``torch.compile`` of both. Ours takes channels-last data, and in the cases called
planar NCDHW.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, dtype_name, with_compiled
from vtok_fast.bench.own import Own
from vtok_fast.bench.pairs import undone
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.reference import norm_act as reference

EPS = 1e-6
PEERS = "eager; best PyTorch (channels last); torch.compile of both"


@dataclass(frozen=True)
class Case:
    """``kind`` of norm and its ``groups``; ``size`` is (C, T, H, W) of each of ``batch`` clips."""

    model: str
    kind: str
    groups: int
    size: tuple[int, int, int, int]
    planar: bool = False
    compile: bool = False
    batch: int = 1

    def __str__(self) -> str:
        size = "x".join(map(str, self.size if self.batch == 1 else (self.batch, *self.size)))
        return f"{self.model} {self.kind} {size}{' planar' if self.planar else ''}"


_CASES = [
    Case("vidtok", "layer", 1, (128, 8, 96, 96), compile=True),
    Case("vidtok", "layer", 1, (256, 10, 48, 48)),
    Case("vidtok", "layer", 1, (512, 5, 32, 32)),
    Case("vidtok", "layer", 1, (128, 8, 96, 96), planar=True),
    Case("wan2.1", "rms", 1, (96, 4, 128, 128), compile=True),
    Case("wan2.1", "rms", 1, (192, 4, 64, 64)),
    Case("wan2.1", "rms", 1, (384, 1, 32, 32)),
    Case("wan2.1", "rms", 1, (96, 4, 128, 128), planar=True),
    Case("vidtok", "group", 32, (128, 8, 96, 96), compile=True),
    Case("vidtok", "group", 32, (512, 5, 32, 32)),
    Case("cosmos", "group", 1, (256, 5, 64, 64)),
    Case("cosmos", "group", 1, (512, 3, 32, 32)),
    Case("vidtok", "group", 32, (128, 8, 96, 96), planar=True),
]


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [Case(c.model, c.kind, c.groups, (*c.size[:2], 16, 16)) for c in _CASES if c.compile]
    # A CPU gets a part of the frames that a GPU gets.
    return (
        [replace(c, size=(*c.size[:2], 2 * c.size[2], 2 * c.size[3])) for c in _CASES]
        if settings.on_gpu
        else _CASES
    )


def own(wish: Own) -> Case:
    wish.only("norm_act", "kind", "groups")
    batch, *size = wish.sizes("B,C,T,H,W")
    kind = wish.one_of("kind", ("layer", "rms", "group"), "layer")
    groups = wish.groups or (32 if kind == "group" and size[0] % 32 == 0 else 1)
    if size[0] % groups:
        raise ValueError(f"groups={groups}: does not divide {size[0]} channels")
    return Case("own", kind, groups, tuple(size), compile=wish.compile, batch=batch)


def _fold(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])


def _unfold(y: Tensor, batch: int = 1) -> Tensor:
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def eager_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """VidTok: frames are folded into the batch already; LayerNorm over channels by permutes."""
    y = F.layer_norm(x.movedim(1, -1), x.shape[1:2], weight, bias, EPS).movedim(-1, 1)
    return y * torch.sigmoid(y)


def eager_rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Wan: F.normalize over channels, times sqrt(C), times gamma, plus its bias of 0.0."""
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * weight.view(-1, 1, 1, 1) + 0.0)


def eager_group(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int) -> Tensor:
    """VidTok and Cosmos: GroupNorm of each frame, with frames folded into the batch by a copy."""
    y = F.group_norm(_fold(x), groups, weight, bias, EPS)
    return _unfold(y * torch.sigmoid(y), x.shape[0])


def best_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x.permute(0, 2, 3, 4, 1), x.shape[1:2], weight, bias, EPS)).permute(
        0, 4, 1, 2, 3
    )


def best_rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x.permute(0, 2, 3, 4, 1), x.shape[1:2], weight, EPS)).permute(0, 4, 1, 2, 3)


def best_group(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int) -> Tensor:
    frames = x[0].transpose(0, 1) if x.shape[0] == 1 else _fold(x)  # of one clip, a view
    return _unfold(F.silu(F.group_norm(frames, groups, weight, bias, EPS)), x.shape[0])


EAGER = {"layer": eager_layer, "rms": eager_rms, "group": eager_group}
BEST = {"layer": best_layer, "rms": best_rms, "group": best_group}


def build(case: Case, settings: Settings) -> Trial:
    torch.manual_seed(0)
    c, dtype = case.size[0], settings.working_dtype
    make = partial(torch.randn, device=settings.device)
    x = make(case.batch, *case.size).to(dtype)
    weight, bias = (1 + 0.1 * make(c)).to(dtype), (0.1 * make(c)).to(dtype)
    x_last = x.contiguous(memory_format=torch.channels_last_3d)
    first = _fold(x).contiguous() if case.kind == "layer" else x
    grouping = {"groups": case.groups} if case.kind == "group" else {}
    eager = Candidate("eager", partial(EAGER[case.kind], **grouping), "eager", inputs=(first, weight, bias))
    best = Candidate("best PyTorch", partial(BEST[case.kind], **grouping), inputs=(x_last, weight, bias))
    candidates, missing = [eager, best], {}
    if case.compile:
        found, missing = with_compiled(candidates, settings)
        candidates += found
    bias = None if case.kind == "rms" else bias
    what = {"kind": case.kind, "groups": case.groups, "per_frame": True, "eps": EPS, "activation": "silu"}
    ours = Candidate(
        "vtok_fast", partial(norm_act, **what), "ours", inputs=(x if case.planar else x_last, weight, bias)
    )

    exact = reference.norm_act(x.double(), weight.double(), None if bias is None else bias.double(), **what)
    result, theirs = ours.call(), best.call()
    measured = parity.close(result, exact, theirs)
    facts = {
        "megabytes": 2 * x.numel() * x.element_size() / 1e6,
        "dtype": dtype_name(dtype),
        "backend": backend_of(ours.call),
        "error": parity.relative_errors(result, exact)["whole"],
        "eager_error": parity.relative_errors(theirs, exact)["whole"],
    }
    return Trial(
        str(case),
        case.kind,
        [*candidates, ours, *undone("norm_act", ours, settings)],
        facts,
        missing,
        None if measured.ok else f"not close: {measured}",
    )
