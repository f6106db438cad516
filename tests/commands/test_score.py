"""Scoring a reconstruction against its original, in files: what is measured, of which pixels, and what is
refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("torchmetrics")

from vtok_fast import metrics  # noqa: E402
from vtok_fast.commands.detokenize import detokenize  # noqa: E402
from vtok_fast.commands.load_model import load_model  # noqa: E402
from vtok_fast.commands.score import score  # noqa: E402
from vtok_fast.commands.tokenize import tokenize  # noqa: E402
from vtok_fast.io.token_windows import TokenWindows  # noqa: E402
from vtok_fast.io.video import Times, read_video, to_float, write_video  # noqa: E402
from vtok_fast.models import VTok  # noqa: E402


def clip(frames=20, height=32, width=48, seed=0):
    """A smooth scene that moves, which a codec keeps."""
    torch.manual_seed(seed)
    coarse = torch.randn(1, 3, 4, 4, 5)
    return torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")[0].tanh()


@pytest.fixture
def pair(tmp_path):
    x = clip()
    write_video(tmp_path / "a.mp4", x)
    write_video(tmp_path / "b.mp4", (x + 0.2 * torch.randn_like(x)).clamp(-1, 1))
    return tmp_path / "a.mp4", tmp_path / "b.mp4"


def test_pieces_together_are_the_whole(pair):
    found, (a, b) = score(*pair), (read_video(path).video for path in pair)
    assert found["frames"] == 20 and found["size"] == [32, 48]
    assert found["psnr"] == pytest.approx(metrics.psnr(b, a), abs=1e-3) and 10 < found["psnr"] < 40
    assert found["ssim"] == pytest.approx(metrics.ssim(b, a), abs=1e-5)
    assert ("lpips" in found) != ("no_lpips" in found) and "fvd" not in found and "tokens" not in found
    same = score(pair[0], pair[0])
    assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1.0)


@pytest.mark.parametrize("size", [None, (16, 24), 24])
def test_the_original_is_seen_as_it_was_tokenized(tmp_path, size):
    """A frame that the model cut, or that was scaled first: only the right pixels give this figure."""
    write_video(tmp_path / "a.mp4", clip(5, 34, 50))
    seen = read_video(tmp_path / "a.mp4", size=size, dtype=torch.uint8).video
    height, width = (seen.shape[2] // 8 * 8, seen.shape[3] // 8 * 8)
    top, left = (seen.shape[2] - height) // 2, (seen.shape[3] - width) // 2
    write_video(tmp_path / "b.mp4", seen[:, :, top : top + height, left : left + width])
    exact = metrics.psnr(
        read_video(tmp_path / "b.mp4").video, to_float(seen[:, :, top : top + height, left : left + width])
    )
    assert exact > 25 and score(tmp_path / "a.mp4", tmp_path / "b.mp4", size=size)["psnr"] == pytest.approx(
        exact, abs=1e-3
    )
    assert score(tmp_path / "a.mp4", tmp_path / "b.mp4")["psnr"] == pytest.approx(exact, abs=1e-3)


@pytest.mark.slow
def test_what_tokens_cost(tmp_path):
    write_video(tmp_path / "a.mp4", clip())
    model = load_model("vidtok/tiny")
    tokenize(tmp_path / "a.mp4", tmp_path / "a.tokens", model)
    detokenize(tmp_path / "a.tokens", tmp_path / "b.mp4", model)
    found = score(tmp_path / "a.mp4", tmp_path / "b.mp4", tokens=tmp_path / "a.tokens")
    indices = torch.cat([tokens.indices.flatten() for tokens in TokenWindows(tmp_path / "a.tokens")])
    assert found["tokens"] == len(indices) and found["codebook_size"] == 8**6
    # Of the 20 frames, not of those of two windows
    assert found["bits_per_pixel"] == 18 * len(indices) / (20 * 32 * 48)
    used = metrics.codebook_use(indices, 8**6)
    assert (found["codebook_used"], found["perplexity"]) == used and found["psnr"] > 15
    command = [sys.executable, "-m", "vtok_fast.cli", "score", "a.mp4", "b.mp4", "--tokens", "a.tokens"]
    environment = {"cwd": tmp_path, "capture_output": True, "text": True}
    result = subprocess.run([*command, "--json"], **environment)
    assert json.loads(result.stdout) == found, result.stderr
    result = subprocess.run(command, **environment)
    assert (
        result.returncode == 0
        and f"{found['psnr']:.2f}" in result.stdout
        and "bits per pixel" in result.stdout
    )
    write_video(tmp_path / "c.mp4", clip(17))
    with pytest.raises(ValueError, match="tokens: of 20 frames of 32x48, the reconstruction has 17 of 32x48"):
        score(tmp_path / "c.mp4", tmp_path / "c.mp4", tokens=tmp_path / "a.tokens")


def test_latents_have_no_codebook(tmp_path):
    model = VTok("tiny").eval()
    tokens = model.encode(clip(17, 32, 32)[None])
    tokens.save(tmp_path / "a.tokens")
    write_video(tmp_path / "a.mp4", clip(17, 32, 32))
    found = score(tmp_path / "a.mp4", tmp_path / "a.mp4", tokens=tmp_path / "a.tokens")
    assert (
        found["bits_per_pixel"] == tokens.latents.numel() * 32 / (17 * 32 * 32)
        and "codebook_used" not in found
    )


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((3, 4))[:, :, :2].flatten(1)


class Asked(torch.nn.Module):
    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        return torch.stack(
            (
                x.mean((1, 2, 3, 4)),
                torch.full((x.shape[0],), float(not rescale and resize and return_features)),
            ),
            1,
        )


@pytest.mark.filterwarnings(
    "ignore:a Frechet distance of:RuntimeWarning", "ignore:.*torch.jit:DeprecationWarning"
)
def test_fvd_with_a_network_of_the_users(tmp_path):
    write_video(tmp_path / "a.mp4", clip(40))
    write_video(tmp_path / "b.mp4", clip(40, seed=1))
    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    found = score(tmp_path / "a.mp4", tmp_path / "b.mp4", fvd_network=tmp_path / "mean.pt")
    a, b = (
        read_video(tmp_path / name).video[:, :32].unflatten(1, (2, 16)).movedim(1, 0)
        for name in ("a.mp4", "b.mp4")
    )
    assert (
        found["clips"] == 2
        and found["fvd"] == pytest.approx(metrics.fvd([a], [b], Mean()), rel=1e-4)
        and found["fvd"] > 0
    )
    torch.jit.script(Asked()).save(str(tmp_path / "asked.pt"))
    assert metrics.load_fvd_network(tmp_path / "asked.pt")(a)[:, 1].tolist() == [1.0, 1.0]
    write_video(tmp_path / "short.mp4", clip(20))
    with pytest.raises(ValueError, match="at least two clips of 16 frames, the video has 20"):
        score(tmp_path / "short.mp4", tmp_path / "short.mp4", fvd_network=tmp_path / "mean.pt")
    (tmp_path / "no.pt").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="not a TorchScript network"):
        metrics.load_fvd_network(tmp_path / "no.pt")
    with pytest.raises(FileNotFoundError, match="fvd_network"):
        metrics.load_fvd_network(tmp_path / "none.pt")


def test_what_does_not_belong_together_is_refused(pair, tmp_path):
    write_video(tmp_path / "short.mp4", clip(17))
    with pytest.raises(ValueError, match="reconstruction: it has 17 frames, the original 20 frames"):
        score(pair[0], tmp_path / "short.mp4")
    with pytest.raises(ValueError, match="reconstruction: it has 20 frames, the original 17 frames"):
        score(tmp_path / "short.mp4", pair[0])
    with pytest.raises(
        ValueError, match="size=16: the original then has frames of 16x24, the reconstruction of 32x48"
    ):
        score(*pair, size=16)
    with pytest.raises(FileNotFoundError):
        score(pair[0], tmp_path / "none.mp4")
    write_video(tmp_path / "narrow.mp4", clip(5, 8, 48))
    with pytest.raises(ValueError, match="at least 11x11"):
        score(tmp_path / "narrow.mp4", tmp_path / "narrow.mp4")


def test_frames_are_compared_by_time(tmp_path):
    """At another rate each frame is compared with what the original shows then, and is the same here."""
    times = Times(Fraction(1, 1000), tuple(500 + 40 * n for n in range(10)) + (1500, 1700, 1900), 2100)
    write_video(tmp_path / "a.mp4", clip(13), times=times)
    for name, fps in (("same", None), ("fast", 100), ("slow", 5)):
        seen = read_video(tmp_path / "a.mp4", fps=fps, dtype=torch.uint8)
        write_video(tmp_path / f"{name}.mp4", seen.video, times=seen.times)
        found = score(tmp_path / "a.mp4", tmp_path / f"{name}.mp4")
        assert found["frames"] == len(seen.times) and found["psnr"] > 33, name
    seen = read_video(tmp_path / "a.mp4", dtype=torch.uint8)
    write_video(tmp_path / "zero.mp4", seen.video, times=seen.times.from_zero())
    assert score(tmp_path / "a.mp4", tmp_path / "zero.mp4")["psnr"] > 33
    write_video(tmp_path / "even.mp4", seen.video, 13 / 1.6)
    assert score(tmp_path / "a.mp4", tmp_path / "even.mp4")["psnr"] < 30
