"""The metrics against their definitions, and what tokens cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vtok_fast import metrics
from vtok_fast.io.tokens import Tokens
from vtok_fast.models import InfoTok


def videos(noise: float, *, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, size, size, generator=generator) - 0.5
    return (x + noise * torch.randn(x.shape, generator=generator)), x


def test_psnr_is_its_formula():
    pytest.importorskip("torchmetrics")
    y, x = videos(0.1)
    assert metrics.psnr(y, x) == pytest.approx(
        10 * math.log10(4 / (y.clamp(-1, 1) - x).square().mean().item()), abs=1e-4
    )
    assert metrics.psnr(y[0], x[0]) != metrics.psnr(y, x)
    # What lies outside is clamped
    assert metrics.psnr(torch.full_like(x, 9.0), torch.ones_like(x)) == math.inf


def test_ssim_goes_by_frames():
    pytest.importorskip("torchmetrics")
    y, x = videos(0.1)
    assert metrics.ssim(x, x) == pytest.approx(1.0) and 0.3 < metrics.ssim(y, x) < 0.99
    frames = [metrics.ssim(y[b, :, t : t + 1], x[b, :, t : t + 1]) for b in range(2) for t in range(4)]
    assert metrics.ssim(y, x) == pytest.approx(sum(frames) / 8, abs=1e-5)
    with pytest.raises(ValueError, match="both alike"):
        metrics.ssim(y[:1], x)


def test_lpips_is_none_without_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert metrics.lpips(*videos(0.1)) is None


# ---- Frechet distances -------------------------------------------------------------------------------------


def gaussian(n: int, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Samples whose mean and covariance are these, not only in expectation."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians_is_the_closed_form():
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.5, 2.0, 1.0]).double()
    variances = torch.tensor([1.0, 4.0, 0.25]).double(), torch.tensor([9.0, 4.0, 1.0]).double()
    found = metrics.frechet_distance(
        gaussian(50, a, variances[0].diag()), gaussian(80, b, variances[1].diag())
    )
    want = (a - b).square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()  # they commute
    assert found == pytest.approx(want.item(), rel=1e-9)
    one, other = (m @ m.T + torch.eye(3) for m in torch.randn(2, 3, 3, dtype=torch.float64))
    root = torch.linalg.eigvals(one @ other).sqrt().real.sum()  # they do not
    found = metrics.frechet_distance(gaussian(50, a, one).float(), gaussian(80, a, other).float())
    assert found == pytest.approx((one.trace() + other.trace() - 2 * root).item(), rel=1e-4)
    x = gaussian(50, a, one)
    assert metrics.frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert metrics.frechet_distance(x[:, :1], x[:, :1] + 2) == pytest.approx(4.0)


def test_fvd_is_that_of_the_features():
    clips = torch.randn(40, 3, 4, 8, 8)
    features = lambda x: x.mean((2, 3, 4))
    found = metrics.fvd(clips.split(16), [clips * 2 + 1], features)
    assert found == pytest.approx(
        metrics.frechet_distance(features(clips), features(clips * 2 + 1)), rel=1e-5
    )


def test_frechet_distances_refuse_what_they_cannot_be_of():
    x = torch.randn(20, 3)
    for bad in (x[:1], x[:, :2], x[0], torch.full((20, 3), math.nan)):
        with pytest.raises(ValueError, match="generated: features"):
            metrics.frechet_distance(x, bad)
    with pytest.warns(RuntimeWarning, match="of 3 samples in 3 dimensions"):
        metrics.frechet_distance(x[:3], x)
    with pytest.raises(ValueError, match="real: no clips"):
        metrics.fvd([], [x], lambda x: x)
    with pytest.raises(ValueError, match=r"features: of shape \(20,\) for 20 clips"):
        metrics.fvd([x], [x], lambda x: x[:, 0])


def tokens(indices: torch.Tensor) -> Tokens:
    return Tokens("a/b", {}, (4, 16, 16), torch.float32, indices=indices.to(torch.int32))


def test_bits():
    whole = tokens(torch.arange(8).reshape(1, 2, 2, 2))
    assert metrics.bits(whole, 8) == 24 and metrics.bits(whole, 9) == 32
    assert metrics.bits_per_pixel(whole, 8) == 24 / 1024
    dropped = whole.indices.clone()
    dropped[0, 0] = -1
    # A bit for each position says which are there
    assert metrics.bits(replace(whole, indices=dropped), 8) == 4 * 3 + 8
    latents = Tokens(
        "a/b", {}, (4, 16, 16), torch.float32, latents=torch.zeros(1, 3, 1, 2, 2, dtype=torch.bfloat16)
    )
    assert metrics.bits(latents) == 12 * 16
    with pytest.raises(ValueError, match="codebook_size=None"):
        metrics.bits(whole)


def test_bits_are_those_of_the_packed_stream():
    torch.manual_seed(0)
    model = InfoTok("tiny").eval()
    made = model.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1, rate=0.5, selection="topk")
    stored = 8 * len(model.pack(made).to_bytes(model.codebook_size))
    # The header, and bytes that are filled up
    assert 0 <= stored - metrics.bits(made, model.codebook_size) < 8 * 128


def test_codebook_use():
    used = metrics.codebook_use(torch.tensor([[0, 1], [2, -1]]), 6)
    assert used.used == 0.5 and used.perplexity == pytest.approx(3.0)
    assert metrics.codebook_use(torch.tensor([0, 0, 0, 1]), 2).perplexity == pytest.approx(
        2**0.8112781, rel=1e-6
    )
    for bad in (torch.tensor([6]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="size=6"):
            metrics.codebook_use(bad, 6)
