"""``norm_act`` against PyTorch: norm and SiLU on the activations of VidTok, Wan 2.1 and Cosmos.

Peers: *eager*, the chain that the model ships, NCDHW, with its permutes and with SiLU as x * sigmoid(x) where the model writes it
so; *best PyTorch*, the norm's own operator on channels-last data and F.silu; for the first case of each kind ``torch.compile`` of
both. Ours takes channels-last data, and in the cases called planar NCDHW.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Candidate, Settings, Trial, compiled
from vtok_fast import parity
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.reference import norm_act as reference

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """``kind`` of norm and its ``groups``; ``size`` is (C, T, H, W)."""

    model: str
    kind: str
    groups: int
    size: tuple[int, int, int, int]
    planar: bool = False
    compile: bool = False

    def __str__(self) -> str:
        return f"{self.model} {self.kind} {'x'.join(map(str, self.size))}{' planar' if self.planar else ''}"


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
    return _CASES


def _fold(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1], *x.shape[3:])


def _unfold(y: Tensor) -> Tensor:
    return y.unsqueeze(0).transpose(1, 2)


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
    return _unfold(y * torch.sigmoid(y))


def best_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.layer_norm(x.permute(0, 2, 3, 4, 1), x.shape[1:2], weight, bias, EPS)).permute(0, 4, 1, 2, 3)


def best_rms(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.silu(F.rms_norm(x.permute(0, 2, 3, 4, 1), x.shape[1:2], weight, EPS)).permute(0, 4, 1, 2, 3)


def best_group(x: Tensor, weight: Tensor, bias: Tensor, *, groups: int) -> Tensor:
    return _unfold(F.silu(F.group_norm(x[0].transpose(0, 1), groups, weight, bias, EPS)))


def build(case: Case, settings: Settings) -> Trial:
    torch.manual_seed(0)
    c = case.size[0]
    x, weight, bias = torch.randn(1, *case.size), 1 + 0.1 * torch.randn(c), 0.1 * torch.randn(c)
    x_last = x.contiguous(memory_format=torch.channels_last_3d)
    if case.kind == "layer":
        folded = _fold(x).contiguous()
        eager, best = partial(eager_layer, folded, weight, bias), partial(best_layer, x_last, weight, bias)
    elif case.kind == "rms":
        eager, best = partial(eager_rms, x, weight, bias), partial(best_rms, x_last, weight, bias)
        bias = None
    else:
        eager = partial(eager_group, x, weight, bias, groups=case.groups)
        best = partial(best_group, x_last, weight, bias, groups=case.groups)
    ours = partial(norm_act, x if case.planar else x_last, weight, bias,
                   kind=case.kind, groups=case.groups, per_frame=True, eps=EPS, activation="silu")
    candidates, missing = [Candidate("eager", eager, "eager"), Candidate("best PyTorch", best)], {}
    if case.compile:
        for of in tuple(candidates):
            fast, why = compiled(of.call)
            if fast is None:
                missing[f"torch.compile({of.name})"] = why
            else:
                candidates.append(Candidate(f"torch.compile({of.name})", fast))
    candidates.append(Candidate("vtok_fast", ours, "ours"))

    exact = reference.norm_act(x.double(), weight.double(), None if bias is None else bias.double(), kind=case.kind,
                               groups=case.groups, per_frame=True, eps=EPS, activation="silu")
    result, theirs = ours(), best()
    measured = parity.close(result, exact, theirs)
    facts = {"megabytes": 2 * x.numel() * x.element_size() / 1e6, "error": parity.relative_errors(result, exact)["whole"],
             "eager_error": parity.relative_errors(theirs, exact)["whole"]}
    return Trial(str(case), case.kind, candidates, facts, missing, None if measured.ok else f"not close: {measured}")


def test_norm_act(case: Case, run_trial) -> None:
    run_trial(case)
