"""The two contracts, measured.

- *exact*: the result equals the reference bit for bit (`torch.equal`, same dtype and shape).
- *close*: with ref64 computed in float64, the relative error ``norm(y - ref64) / norm(ref64)`` is at most the
  larger of twice the error of PyTorch's own op in the same dtype on the same inputs, and 16 eps(float32) plus
  half an eps of the output's dtype where that is narrower (64 eps of float64 in float64). The same bound
  holds for each frame and for the outermost rows, columns and frames alone, relative to the share of the norm
  that a region of its size has on average where it is smaller than that: one wrong border pixel cannot hide,
  and a region that happens to be almost zero does not fail for
      nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CONTRACTS = ("exact", "close")


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


def close(y: Tensor, ref64: Tensor, same_dtype: Tensor | None = None) -> Parity:
    """Measures the *close* contract.

    Args:
        y: the result to judge.
        ref64: the reference in float64, the same shape.
        same_dtype: PyTorch's own result in the dtype of ``y`` on the same inputs, or None to allow only the
            floor.
    """
    if y.shape != ref64.shape:
        raise ValueError(f"y: expected shape {tuple(ref64.shape)}, got {tuple(y.shape)}")
    if not torch.equal(torch.isfinite(y), torch.isfinite(ref64.to(y.dtype))):
        return Parity("close", False, float("inf"), floor(y.dtype), "values that are not finite")
    errors = relative_errors(y, ref64)
    allowed = dict.fromkeys(errors, floor(y.dtype))
    if same_dtype is not None:
        allowed |= {
            name: max(floor(y.dtype), 2 * e) for name, e in relative_errors(same_dtype, ref64).items()
        }
    worst = max(errors, key=lambda name: errors[name] / allowed[name])
    return Parity("close", errors[worst] <= allowed[worst], errors[worst], allowed[worst], worst)


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
