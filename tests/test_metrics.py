"""The metrics against their definitions, and what tokens cost."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from vtok_fast import metrics
from vtok_fast.models import InfoTok
from vtok_fast.tokens import Tokens


def videos(noise: float, *, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 4, size, size, generator=generator) - 0.5
    return (x + noise * torch.randn(x.shape, generator=generator)), x


def test_psnr_is_its_formula():
    pytest.importorskip("torchmetrics")
    y, x = videos(0.1)
    assert metrics.psnr(y, x) == pytest.approx(10 * math.log10(4 / (y.clamp(-1, 1) - x).square().mean().item()), abs=1e-4)
    assert metrics.psnr(y[0], x[0]) != metrics.psnr(y, x)
    assert metrics.psnr(torch.full_like(x, 9.0), torch.ones_like(x)) == math.inf  # what lies outside is clamped


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


def tokens(indices: torch.Tensor) -> Tokens:
    return Tokens("a/b", {}, (4, 16, 16), torch.float32, indices=indices.to(torch.int32))


def test_bits():
    whole = tokens(torch.arange(8).reshape(1, 2, 2, 2))
    assert metrics.bits(whole, 8) == 24 and metrics.bits(whole, 9) == 32
    assert metrics.bits_per_pixel(whole, 8) == 24 / 1024
    dropped = whole.indices.clone()
    dropped[0, 0] = -1
    assert metrics.bits(replace(whole, indices=dropped), 8) == 4 * 3 + 8  # a bit for each position says which are there
    latents = Tokens("a/b", {}, (4, 16, 16), torch.float32, latents=torch.zeros(1, 3, 1, 2, 2, dtype=torch.bfloat16))
    assert metrics.bits(latents) == 12 * 16
    with pytest.raises(ValueError, match="codebook_size=None"):
        metrics.bits(whole)


def test_bits_are_those_of_the_packed_stream():
    torch.manual_seed(0)
    model = InfoTok("tiny").eval()
    made = model.encode(torch.rand(1, 3, 5, 32, 32) * 2 - 1, rate=0.5, selection="topk")
    stored = 8 * len(model.pack(made).to_bytes(model.codebook_size))
    assert 0 <= stored - metrics.bits(made, model.codebook_size) < 8 * 128  # the header, and bytes that are filled up


def test_codebook_use():
    used = metrics.codebook_use(torch.tensor([[0, 1], [2, -1]]), 6)
    assert used.used == 0.5 and used.perplexity == pytest.approx(3.0)
    assert metrics.codebook_use(torch.tensor([0, 0, 0, 1]), 2).perplexity == pytest.approx(2 ** 0.8112781, rel=1e-6)
    for bad in (torch.tensor([6]), torch.tensor([-1])):
        with pytest.raises(ValueError, match="size=6"):
            metrics.codebook_use(bad, 6)
