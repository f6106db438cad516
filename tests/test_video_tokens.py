"""Video to tokens to video by files: windows, sizes, going on after a kill, and refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from vtok_fast import video_tokens  # noqa: E402
from vtok_fast.models import InfoTok, VidTok  # noqa: E402
from vtok_fast.tokens import Tokens  # noqa: E402
from vtok_fast.video import VideoError, open_video, read_video, to_float, write_video  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"ch": 4, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4, "levels": (8, 8, 8, 8)}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Forty frames of 50x66 that differ from one another."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    y, x = torch.meshgrid(torch.linspace(-1, 1, 50), torch.linspace(-1, 1, 66), indexing="ij")
    frames = [torch.stack((torch.sin(3 * x + t / 4), torch.cos(2 * y - t / 6), x * y)) for t in range(40)]
    write_video(path, torch.stack(frames, 1), fps=12.5)
    return path


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VidTok(SMALL).eval()


def test_every_window_is_the_models_own(clip, model, tmp_path):
    seen = []
    tokens = video_tokens.tokenize(clip, tmp_path / "a.tokens", model, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)] and tokens.info == {"fps": 12.5, "frames": 40}
    assert tokens.video_shape == (17, 48, 64) and tokens.batch == 3 and os.listdir(tmp_path) == ["a.tokens"]
    video = to_float(read_video(clip, dtype=torch.uint8).video[:, :, 1:49, 1:65])
    filled = torch.cat((video, video[:, -1:].expand(-1, 11, -1, -1)), 1)
    for index, window in enumerate(filled.split(17, 1)):
        assert torch.equal(tokens.indices[index : index + 1], model.encode(window[None]).indices)

    video_tokens.detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", model)
    back = read_video(tmp_path / "back.mp4")
    assert back.video.shape == (3, 40, 48, 64) and back.fps == 12.5
    expected = torch.cat([model.decode(tokens.clip(i))[0] for i in range(3)], 1)[:, :40].clamp(-1, 1)
    assert (back.video - expected).square().mean() < 0.02  # what H.264 costs


@pytest.mark.parametrize(("size", "shape"), [((32, 32), (32, 32)), (40, (40, 52)), (None, (48, 64))])
def test_sizes(clip, model, tmp_path, size, shape):
    assert video_tokens.tokenize(clip, tmp_path / "a.tokens", model, size=size, window=21).video_shape == (21, *shape)


def test_a_killed_run_goes_on(clip, tmp_path):
    """Killed after its first window; the second run encodes the others alone, and the file is that of an unbroken run."""
    torch.manual_seed(0)
    VidTok(SMALL).save(tmp_path / "model.safetensors")
    program = f"""
import sys, time
from vtok_fast import video_tokens
from vtok_fast.models import VidTok
model = VidTok.from_checkpoint({str(tmp_path / "model.safetensors")!r}).eval()
encode, count = model.encode, 0
def slow(video):
    global count
    count += 1
    if len(sys.argv) > 1 and count > 1:
        time.sleep(600)
    return encode(video)
model.encode = slow
video_tokens.tokenize({str(clip)!r}, {str(tmp_path / "a.tokens")!r}, model)
print(count)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([sys.executable, "-c", program, "slow"], env=environment)
    part = tmp_path / "a.tokens.parts" / "000000.safetensors"
    deadline = time.monotonic() + 120
    while not part.is_file() and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert part.is_file() and not (tmp_path / "a.tokens").exists()
    second = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert second.returncode == 0 and second.stdout.split() == ["2"], second.stderr
    model = VidTok.from_checkpoint(tmp_path / "model.safetensors").eval()
    whole = video_tokens.tokenize(clip, tmp_path / "b.tokens", model)
    assert torch.equal(Tokens.load(tmp_path / "a.tokens").indices, whole.indices) and not part.parent.exists()


def test_parts_of_another_job_are_not_taken(clip, model, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        video_tokens.tokenize(clip, tmp_path / "a.tokens", model, progress=stop)
    torch.manual_seed(1)
    other = VidTok(SMALL).eval()
    assert video_tokens.fingerprint(other) != video_tokens.fingerprint(model)
    tokens = video_tokens.tokenize(clip, tmp_path / "a.tokens", other)
    assert torch.equal(tokens.indices, video_tokens.tokenize(clip, tmp_path / "b.tokens", other).indices)


def test_windows_are_read_one_at_a_time(clip):
    with open_video(clip) as source:
        windows = [(count, read().shape) for count, read in source.windows(16, (16, 16))]
    assert windows == [(16, (3, 16, 16, 16)), (16, (3, 16, 16, 16)), (8, (3, 8, 16, 16))]


def test_refusals(clip, model, tmp_path):
    path = tmp_path / "a.tokens"
    with pytest.raises(ValueError, match="window=18: must be 1 \\+ a multiple of 4"):
        video_tokens.tokenize(clip, path, model, window=18)
    with pytest.raises(ValueError, match="size=30x32.*multiples of 4"):
        video_tokens.tokenize(clip, path, model, size=(30, 32))
    with pytest.raises(FileNotFoundError, match="absent"):
        video_tokens.tokenize(tmp_path / "absent.mp4", path, model)
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    with pytest.raises(VideoError, match="noise"):
        video_tokens.tokenize(tmp_path / "noise.mp4", path, model)
    with pytest.raises(OSError, match="output: cannot write"):
        video_tokens.tokenize(clip, tmp_path / "nowhere" / "a.tokens", model)
    video_tokens.tokenize(clip, path, model)
    with pytest.raises(ValueError, match="tokens come from"):
        video_tokens.detokenize(path, tmp_path / "back.mp4", VidTok(SMALL | {"ch": 8}).eval())
    with pytest.raises(ValueError, match="vidtok/big needs one"):
        video_tokens.load_model("vidtok/big")
    with pytest.raises(ValueError, match="model='vidtalk/tiny': the tokenizers are"):
        video_tokens.load_model("vidtalk/tiny")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        video_tokens.detokenize(path, tmp_path / "back.mp4", model)
    assert not list(tmp_path.glob("back.mp4*"))


def test_a_rate_keeps_that_share_and_the_file_shrinks(clip, tmp_path):
    torch.manual_seed(0)
    chooser = InfoTok("tiny").eval()
    sizes = {}
    for rate in (0.75, 0.25):
        made = video_tokens.tokenize(clip, tmp_path / "a.tokens", chooser, rate=rate)
        kept = (made.indices >= 0).float().mean()
        assert abs(kept - rate) < 0.02
        loaded = Tokens.load(tmp_path / "a.tokens")
        assert torch.equal(loaded.indices, made.indices) and loaded.indices.dtype == torch.int32
        sizes[rate] = (tmp_path / "a.tokens").stat().st_size
    whole = made.indices.numel() * 4
    assert sizes[0.25] < sizes[0.75] and sizes[0.75] - sizes[0.25] > 0.4 * made.indices.numel()  # 16 bits for half of the positions
    assert sizes[0.25] < whole + 1024
    video_tokens.detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", chooser)
    assert read_video(tmp_path / "back.mp4").video.shape[1] == 40


def test_a_rate_needs_a_model_that_chooses(clip, model, tmp_path):
    with pytest.raises(ValueError, match="rate=0.5: vidtok models keep all"):
        video_tokens.tokenize(clip, tmp_path / "a.tokens", model, rate=0.5)
