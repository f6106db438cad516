"""The contracts, measured.

- *exact*: the result equals the reference bit for bit (`torch.equal`, same dtype and shape).
- *close*: with ref64 computed in float64, the relative error ``norm(y - ref64) / norm(ref64)`` is at most the
  larger of twice the error of PyTorch's own op in the same dtype on the same inputs, and 16 eps(float32) plus
  half an eps of the output's dtype where that is narrower (64 eps of float64 in float64). The same bound
  holds for each frame and for the outermost rows, columns and frames alone, relative to the share of the norm
  that a region of its size has on average where it is smaller than that: one wrong border pixel cannot hide,
  and a region that happens to be almost zero does not fail for nothing. What these norms average over,
  `close_locally` measures for `causal_conv3d`: the error of every output against what it and its neighbors
  read.
- *fast*: the same relative error, per region, is at most `FAST`: what rounding both operands of a product to
  e4m3 can do to it at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast.reference.e4m3 import ROUNDING as E4M3_ROUNDING

CONTRACTS = ("exact", "close", "fast")
FAST = (1 + E4M3_ROUNDING) ** 2 - 1  # 0.129


def floor(dtype: torch.dtype) -> float:
    """The error that the *close* contract always allows in this output dtype."""
    if dtype == torch.float64:
        return 64 * torch.finfo(torch.float64).eps
    narrow = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    return 16 * torch.finfo(torch.float32).eps + narrow


def regions(x: Tensor) -> dict[str, Tensor]:
    """The whole, and for a video (B, C, T, H, W) each frame and the border rows, columns and frames
    (views)."""
    parts = {"whole": x}
    if x.dim() == 5:
        parts |= {f"frame {t}": x[:, :, t] for t in range(x.shape[2])}
        for name, axis in (("row", 3), ("column", 4)):
            parts |= {f"first {name}": x.select(axis, 0), f"last {name}": x.select(axis, -1)}
    elif x.dim() >= 3:
        for axis in range(2, x.dim()):
            parts |= {f"first of axis {axis}": x.select(axis, 0), f"last of axis {axis}": x.select(axis, -1)}
    return parts


def relative_errors(y: Tensor, ref64: Tensor) -> dict[str, float]:
    """Per region, norm(y - ref64) / norm(ref64), with the region's norm at least its average share of the
    whole."""
    difference = y.double() - ref64
    whole = ref64.norm().item()
    references = regions(ref64)
    errors = {}
    for name, part in regions(difference).items():
        share = whole * (part.numel() / max(difference.numel(), 1)) ** 0.5
        scale = max(references[name].norm().item(), share)
        error = part.norm().item()
        errors[name] = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
    return errors


@dataclass(frozen=True)
class Parity:
    """What was measured: the worst region's error against its bound. ``ok`` says whether the contract
    holds."""

    contract: str
    ok: bool
    error: float
    bound: float
    region: str = "whole"
    mismatches: int = 0

    def __str__(self) -> str:
        if self.contract == "exact":
            return "equal" if self.ok else f"{self.mismatches} elements differ"
        return f"{self.error:.2e} of {self.bound:.2e} allowed ({self.region})"


def close(y: Tensor, ref64: Tensor, same_dtype: Tensor | None = None, *, inside: float = 0.0) -> Parity:
    """Measures the *close* contract.

    Args:
        y: the result to judge.
        ref64: the reference in float64, the same shape.
        same_dtype: PyTorch's own result in the dtype of ``y`` on the same inputs, or None to allow only the
            floor.
        inside: for the result of several layers in a row, the root of the sum of the squares of the errors
            that those which were replaced have by themselves. Independent errors add up that way to the error
            that PyTorch's layers make together.
    """
    if y.shape != ref64.shape:
        raise ValueError(f"y: expected shape {tuple(ref64.shape)}, got {tuple(y.shape)}")
    if not torch.equal(torch.isfinite(y), torch.isfinite(ref64.to(y.dtype))):
        return Parity("close", False, float("inf"), floor(y.dtype), "values that are not finite")
    errors = relative_errors(y, ref64)
    allowed = dict.fromkeys(errors, floor(y.dtype))
    if same_dtype is not None:
        allowed |= {
            name: max(floor(y.dtype), 2 * math.hypot(e, inside))
            for name, e in relative_errors(same_dtype, ref64).items()
        }
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return Parity("close", errors[worst] <= allowed[worst], errors[worst], allowed[worst], worst)


def fast(y: Tensor, ref64: Tensor) -> Parity:
    """Measures the *fast* contract; the arguments are those of `close`."""
    if y.shape != ref64.shape:
        raise ValueError(f"y: expected shape {tuple(ref64.shape)}, got {tuple(y.shape)}")
    if not torch.equal(torch.isfinite(y), torch.isfinite(ref64.to(y.dtype))):
        return Parity("fast", False, float("inf"), FAST, "values that are not finite")
    errors = relative_errors(y, ref64)
    worst = max(errors, key=lambda name: errors[name])
    return Parity("fast", errors[worst] <= FAST, errors[worst], FAST, worst)


def psnr(y: Tensor, ref64: Tensor) -> float:
    """Peak signal-to-noise ratio in dB: the square of the range of the float64 result, from its least value
    to its largest, over the mean squared error. Infinite where they are equal."""
    error = (y.double() - ref64).square().mean().item()
    span = (ref64.max() - ref64.min()).item()
    return 10 * math.log10(span**2 / error) if error > 0 and span > 0 else math.inf if error == 0 else 0.0


LOCAL = 16.0  # eps of float32, see close_locally
_REACH = 3


def close_locally(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Parity:
    """Measures the local part of the *close* contract of ``causal_conv3d``: no output may be worse because of
    what is far from it.

    With ``m`` the sum of ``|x| |weight|`` (and ``|bias|``) over the ``n`` products of an output, the error of
    every output is at most ``LOCAL + sqrt(n)`` eps(float32) of the largest ``m`` within 3 rows and columns of
    it in the same frame, plus half an eps of the output's dtype where that is narrower, of the output itself.
    (A float32 sum of ``n`` products errs by a multiple of ``sqrt(n)`` eps of ``m``: Higham and Mary, "A new
    approach to probabilistic rounding error analysis", 2019. Three rows and columns lie between outputs of
    one Winograd tile.) Where the float64 result is not finite in the dtype of ``y``, ``y`` must not be finite
    either, and nowhere else.

    Args:
        y: the result to judge, (B, O, To, Ho, Wo).
        x, weight, bias: the arguments of ``causal_conv3d``.
        options: its keyword arguments that say where it reads: ``stride``, ``dilation``, ``groups``,
            ``time_pad``, ``spatial_pad``, ``time_mode``, ``spatial_mode``, ``cache``, ``upsample`` and
            ``upsample_first_frame_once``.

    Returns:
        The worst output's error as a multiple of its own bound: ``bound`` is 1, ``region`` gives the index.
    """
    from vtok_fast.ops.causal_conv3d import causal_conv3d

    cache = options.pop("cache", None)

    def apply(function: Any) -> Tensor:
        tensors: list[Any] = [None if t is None else function(t.double()) for t in (x, weight, bias, cache)]
        return causal_conv3d(*tensors[:3], cache=tensors[3], backend="reference", **options)

    ref = apply(lambda t: t)
    if y.shape != ref.shape:
        raise ValueError(f"y: expected shape {tuple(ref.shape)}, got {tuple(y.shape)}")
    finite = torch.isfinite(ref.to(y.dtype))
    if not torch.equal(torch.isfinite(y), finite):
        where = (torch.isfinite(y) != finite).nonzero()[0].tolist()
        return Parity("close", False, float("inf"), 1.0, f"{where}, which is finite in one of both")
    # Infinities say nothing about rounding; what they reach is settled, what they do not is measured.
    sums = apply(lambda t: t.abs().nan_to_num(nan=0.0, posinf=0.0))
    frames = sums.transpose(1, 2).flatten(0, 1)
    around = F.max_pool2d(frames, 2 * _REACH + 1, 1, _REACH)
    around = around.unflatten(0, (sums.shape[0], sums.shape[2])).transpose(1, 2)
    narrow = torch.finfo(y.dtype).eps / 2 if y.dtype in (torch.float16, torch.bfloat16) else 0.0
    eps = torch.finfo(torch.float64 if y.dtype == torch.float64 else torch.float32).eps
    multiple = LOCAL + weight[0].numel() ** 0.5
    bound = multiple * eps * around + narrow * ref.abs() + torch.finfo(y.dtype).tiny
    ratio = torch.where(finite, (y.double() - ref).abs() / bound, 0.0)
    if not ratio.numel():
        return Parity("close", True, 0.0, 1.0)
    worst = int(ratio.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape)]
    return Parity("close", bool(ratio.max() <= 1), ratio.max().item(), 1.0, str(index))


def exact(y: Tensor, reference: Tensor) -> Parity:
    """Measures the *exact* contract; NaN equals NaN."""
    if y.shape != reference.shape or y.dtype != reference.dtype:
        return Parity("exact", False, float("inf"), 0.0, "shape or dtype", max(y.numel(), reference.numel()))
    differ = ~(
        (y == reference) | (y.isnan() & reference.isnan()) if y.is_floating_point() else y == reference
    )
    count = int(differ.sum())
    return Parity("exact", count == 0, float(count) / max(y.numel(), 1), 0.0, mismatches=count)


@dataclass(frozen=True)
class TokenParity:
    """How the tokens of two runs compare.

    ``equal`` of ``total`` tokens agree. ``unexplained`` counts those that differ although no channel of their
    float64 latent lies within 4 times the measured latent error of a rounding threshold: it must be 0.
    ``flips`` and ``eager_flips`` count the tokens of each run that differ from float64's; the fast run may
    have at most one in 10,000 more.
    """

    equal: int
    total: int
    unexplained: int
    flips: int
    eager_flips: int
    latent_error: float

    @property
    def ok(self) -> bool:
        return self.unexplained == 0 and self.flips <= self.eager_flips + self.total / 10_000

    def __str__(self) -> str:
        text = f"{self.equal} of {self.total} tokens equal"
        if self.equal < self.total:
            text += (
                f", {self.total - self.equal - self.unexplained} of the others within rounding of a threshold"
            )
        return text + f"; against float64 {self.flips} flips, eager {self.eager_flips}"


def tokens(fast: Tensor, eager: Tensor, ref64: Tensor, levels: tuple[int, ...]) -> TokenParity:
    """Compares the FSQ tokens of three latents (B, len(levels), t, h, w) of one video: fast, eager and
    float64."""
    from vtok_fast.ops.fsq import fsq_quantize
    from vtok_fast.reference.fsq import thresholds

    index = {
        name: fsq_quantize(z, levels).indices
        for name, z in (("fast", fast), ("eager", eager), ("ref", ref64))
    }
    differ = index["fast"] != index["eager"]
    error = torch.maximum((fast.double() - ref64).abs(), (eager.double() - ref64).abs()).max().item()
    near = torch.zeros_like(differ)
    for channel, count in enumerate(levels):
        distance = (ref64[:, channel, ..., None] - torch.as_tensor(thresholds(count)).double()).abs().amin(-1)
        near |= distance <= 4 * error
    return TokenParity(
        int((~differ).sum()),
        differ.numel(),
        int((differ & ~near).sum()),
        int((index["fast"] != index["ref"]).sum()),
        int((index["eager"] != index["ref"]).sum()),
        error,
    )
