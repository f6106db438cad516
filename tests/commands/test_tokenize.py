"""Video to tokens to video by files: windows, sizes, going on after a kill, and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from vtok_fast.commands.detokenize import detokenize  # noqa: E402
from vtok_fast.commands.load_model import fingerprint, load_model  # noqa: E402
from vtok_fast.commands.model_frames import center  # noqa: E402
from vtok_fast.commands.tokenize import reading_of, tokenize  # noqa: E402
from vtok_fast.io.token_windows import TokenWindows, write_windows  # noqa: E402
from vtok_fast.io.tokens import Tokens  # noqa: E402
from vtok_fast.io.video import Times, VideoError, open_video, read_video, to_float, write_video  # noqa: E402
from vtok_fast.models import InfoTok, ProMAG, TivTok, VidTok, VTok  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
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


def pixels(clip, factor, size=None):
    """The frames as they are tokenized, (1, 3, T, H, W)."""
    video = to_float(read_video(clip, size=size, dtype=torch.uint8).video)
    height, width = (n // factor * factor for n in video.shape[2:])
    return center(video, height, width)[None]


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.data, b.data) for a, b in zip(one, other, strict=True)
    )


def test_every_window_is_the_models_own(clip, model, tmp_path):
    seen = []
    tokens = tokenize(
        clip, tmp_path / "a.tokens", model, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)] and os.listdir(tmp_path) == ["a.tokens"]
    assert tokens.info == {
        "times": {"base": [1, 12800], "start": 0, "steps": [[1024, 40]]},
        "fps": 12.5,
        "frames": 40,
        "window": 17,
        "overlap": 0,
        "weights": fingerprint(model),
    }
    # Six, and three copies
    assert [window.video_shape for window in tokens] == [
        (17, 48, 64),
        (17, 48, 64),
        (9, 48, 64),
    ]
    video = pixels(clip, 4)
    filled = torch.cat((video, video[:, :, -1:].expand(-1, -1, 3, -1, -1)), 2)
    for window, own in zip(filled.split(17, 2), tokens, strict=True):
        assert torch.equal(own.indices, model.encode(window).indices)

    detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", model)
    back = read_video(tmp_path / "back.mp4")
    assert back.video.shape == (3, 40, 48, 64) and back.fps == 12.5
    expected = torch.cat([model.decode(window)[0] for window in tokens], 1)[:, :40].clamp(-1, 1)
    assert (back.video - expected).square().mean() < 0.02  # what H.264 costs


PROMAG = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1, "mid_blocks": 1, "groups": 4}


@pytest.mark.parametrize(
    ("make", "options", "sizes"),
    [
        (lambda: ProMAG(PROMAG), {}, [17, 17, 14]),
        (lambda: InfoTok("tiny"), {"window": 17, "overlap": 3}, [17, 17, 12]),
        (lambda: VTok("tiny"), {}, [16, 16, 8]),
        (lambda: TivTok({**TivTok("tiny").config.to_dict(), "frames": 4, "name": "small"}), {}, [32, 8]),
    ],
)
def test_windows_overlap_and_blend_as_the_models_own_stream(
    clip, tmp_path, make, options, sizes, monkeypatch
):
    torch.manual_seed(0)
    model = make().eval()
    tokens = tokenize(clip, tmp_path / "a.tokens", model, size=(16, 32), **options)
    stream = model.stream(*options.values())
    video = pixels(clip, model.config.spatial_factor, (16, 32))
    expected = [stream.encode_chunk(video[:, :, start:end]) for start, end in stream.chunks(40)]
    assert [part.video_shape[0] for part in expected] == sizes and same(tokens, expected)
    frames = torch.cat(
        [
            stream.decode_chunk(part, lookahead=after)
            for part, after in zip(expected, [*expected[1:], None], strict=True)
        ],
        2,
    )
    written = {}
    monkeypatch.setattr("vtok_fast.commands.detokenize.join_videos", lambda output, parts, start: None)
    monkeypatch.setattr(
        "vtok_fast.commands.detokenize.write_video",
        lambda part, video, times: written.update({part.name: video}),
    )
    detokenize(tmp_path / "a.tokens", tmp_path / "b.mp4", model)
    assert torch.equal(torch.cat(list(written.values()), 1), frames[0])


def test_128_frames_share_the_invariant_tokens(tmp_path):
    write_video(tmp_path / "long.mp4", torch.rand(3, 130, 16, 16))
    torch.manual_seed(0)
    small = {"dim": 24, "depth": 1, "heads": 2, "codebook": 16}
    model = TivTok({**TivTok.Config.get("t128").to_dict(), "rotary_split": None, **small}).eval()
    first, second = tokenize(tmp_path / "long.mp4", tmp_path / "a.tokens", model)
    assert (first.video_shape[0], first.data[:, 0].numel()) == (128, 352)
    assert (second.video_shape[0], second.data[:, 0].numel()) == (2, 96 + 8)


@pytest.mark.parametrize(("size", "shape"), [((32, 32), (32, 32)), (40, (40, 52)), (None, (48, 64))])
def test_sizes(clip, model, tmp_path, size, shape):
    assert tokenize(clip, tmp_path / "a.tokens", model, size=size, window=21)[0].video_shape == (
        21,
        *shape,
    )


PROGRAM = """
import importlib, signal, sys
from vtok_fast.models import ProMAG
model = ProMAG.from_checkpoint(sys.argv[2]).eval()
what, count = sys.argv[1], 0
call = getattr(model, "decode" if what == "detokenize" else "encode")
def slow(x):
    global count
    count += 1
    if len(sys.argv) > 5 and count > 1:
        print("at the second window", flush=True)
        signal.pause()
    return call(x)
setattr(model, call.__name__, slow)
work = getattr(importlib.import_module(f"vtok_fast.commands.{what}"), what)
work(sys.argv[3], sys.argv[4], model, **({"size": 16} if what == "tokenize" else {}))
print(count)
"""


def killed_and_run_again(*arguments, part):
    """Kill the program when it comes to its second window, and run it again. Returns how many windows the
    second run worked on."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen([*command, "slow"], env=environment, stdout=pipe, stderr=pipe, text=True) as first:
        said = first.stdout.readline()  # nothing at all where the program ended first
        first.kill()
        assert said == "at the second window\n", first.stderr.read()
    assert part.is_file() and not arguments[-1].exists()
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    return int(second.stdout)


@pytest.mark.volatile
def test_a_killed_run_goes_on(clip, tmp_path):
    """Killed after its first window; the second run works on the others alone, and the file is that of an
    unbroken run."""
    torch.manual_seed(0)
    ProMAG(PROMAG).save(tmp_path / "model.safetensors")
    output = tmp_path / "a.tokens"
    part = tmp_path / "a.tokens.parts" / "000000.safetensors"
    assert killed_and_run_again("tokenize", tmp_path / "model.safetensors", clip, output, part=part) == 2
    model = ProMAG.from_checkpoint(tmp_path / "model.safetensors").eval()
    whole = tokenize(clip, tmp_path / "b.tokens", model, size=16)
    assert same(TokenWindows(output), whole) and not part.parent.exists()

    back, part = tmp_path / "a.mp4", tmp_path / "a.mp4.parts" / "000000.mp4"
    again = killed_and_run_again("detokenize", tmp_path / "model.safetensors", output, back, part=part)
    assert again == 3  # the first one once more, for the frames that the second one shares
    detokenize(output, tmp_path / "b.mp4", model)
    assert (
        torch.equal(read_video(back).video, read_video(tmp_path / "b.mp4").video) and not part.parent.exists()
    )
    assert read_video(back).video.shape[1] == 40


def test_a_run_that_goes_on_knows_all_windows_that_share_a_frame(clip, tmp_path):
    torch.manual_seed(0)
    model = VTok("tiny").eval()
    tokenize(clip, tmp_path / "a.tokens", model, size=16, overlap=12)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        detokenize(tmp_path / "a.tokens", tmp_path / "a.mp4", model, progress=stop)
    for name in ("a.mp4", "b.mp4"):
        detokenize(tmp_path / "a.tokens", tmp_path / name, model)
    assert torch.equal(read_video(tmp_path / "a.mp4").video, read_video(tmp_path / "b.mp4").video)


def test_parts_of_another_job_are_not_taken(clip, model, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total):
        raise Stop

    with pytest.raises(Stop):
        tokenize(clip, tmp_path / "a.tokens", model, progress=stop)
    torch.manual_seed(1)
    other = VidTok(SMALL).eval()
    assert fingerprint(other) != fingerprint(model)
    tokens = tokenize(clip, tmp_path / "a.tokens", other)
    assert same(tokens, tokenize(clip, tmp_path / "b.tokens", other))


@pytest.mark.parametrize("entries", [["notes.txt"], ["000000.mp4"], ["job.json"]])
def test_a_folder_that_is_not_ours_stays(clip, model, tmp_path, entries):
    folder = tmp_path / "a.tokens.parts"
    folder.mkdir()
    for name in entries:
        (folder / name).write_text('{"theirs": 1}')
    with pytest.raises(ValueError, match=r"output: the folder .*a\.tokens\.parts is not one"):
        tokenize(clip, tmp_path / "a.tokens", model)
    assert sorted(os.listdir(folder)) == entries


def test_what_else_lies_in_our_folder_stays(clip, model, tmp_path):
    folder = tmp_path / "a.tokens.parts"
    folder.mkdir()  # of a run that was killed before its first window

    def add(done, total):
        (folder / "notes.txt").write_text("mine")

    tokenize(clip, tmp_path / "a.tokens", model, progress=add)
    assert os.listdir(folder) == ["notes.txt"]


def test_other_weights_do_not_decode(clip, model, tmp_path):
    tokenize(clip, tmp_path / "a.tokens", model)
    torch.manual_seed(1)
    other = VidTok(SMALL).eval()
    with pytest.raises(ValueError, match="tokens: made by other weights of vidtok/custom.*--any-weights"):
        detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", other)
    assert not list(tmp_path.glob("back.mp4*"))
    detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", other, any_weights=True)
    assert read_video(tmp_path / "back.mp4").video.shape[1] == 40


def test_files_of_windows(model, tmp_path):
    """Equal windows load as a batch, others do not; what is damaged or mixed is refused; files of one batch
    are windows too."""
    video = torch.rand(1, 3, 9, 16, 16)
    parts = [model.encode(video[:, :, :n]) for n in (9, 9, 5)]
    for index, part in enumerate(parts):
        part.save(tmp_path / str(index))
    write_windows(tmp_path / "even", [tmp_path / "0", tmp_path / "1"], {"frames": 18})
    whole = Tokens.load(tmp_path / "even")
    assert (
        whole.batch == 2 and whole.info == {"frames": 18} and torch.equal(whole.indices[1:], parts[1].indices)
    )
    write_windows(tmp_path / "uneven", [tmp_path / str(n) for n in range(3)], {})
    assert same(TokenWindows(tmp_path / "uneven"), parts)
    with pytest.raises(ValueError, match="uneven holds 3 windows, of which the last one is shorter"):
        Tokens.load(tmp_path / "uneven")
    with pytest.raises(IndexError, match="index=3"):
        TokenWindows(tmp_path / "uneven")[3]
    whole.save(tmp_path / "batch")
    assert same(TokenWindows(tmp_path / "batch"), parts[:2])
    VidTok(SMALL | {"ch": 8}).eval().encode(video).save(tmp_path / "3")
    with pytest.raises(ValueError, match="3 comes from another model or frame size"):
        write_windows(tmp_path / "mixed", [tmp_path / "0", tmp_path / "3"], {})
    data = (tmp_path / "uneven").read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data.replace(b"[9, 16", b"[5, 16", 1)):
        (tmp_path / "uneven").write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged|truncated"):
            TokenWindows(tmp_path / "uneven")


def test_windows_are_read_one_at_a_time(clip):
    with open_video(clip) as source:
        windows = [(count, read().shape) for count, read in source.windows(16, (16, 16))]
    assert windows == [(16, (3, 16, 16, 16)), (16, (3, 16, 16, 16)), (8, (3, 8, 16, 16))]


def test_refusals(clip, model, tmp_path):
    path = tmp_path / "a.tokens"
    with pytest.raises(ValueError, match="window=18: must be 1 \\+ a multiple of 4"):
        tokenize(clip, path, model, window=18)
    with pytest.raises(ValueError, match="size=30x32.*multiples of 4"):
        tokenize(clip, path, model, size=(30, 32))
    with pytest.raises(FileNotFoundError, match="absent"):
        tokenize(tmp_path / "absent.mp4", path, model)
    (tmp_path / "noise.mp4").write_bytes(b"noise" * 100)
    with pytest.raises(VideoError, match="noise"):
        tokenize(tmp_path / "noise.mp4", path, model)
    with pytest.raises(OSError, match="output: cannot write"):
        tokenize(clip, tmp_path / "nowhere" / "a.tokens", model)
    tokenize(clip, path, model)
    with pytest.raises(ValueError, match="tokens come from"):
        detokenize(path, tmp_path / "back.mp4", VidTok(SMALL | {"ch": 8}).eval())
    with pytest.raises(ValueError, match="vidtok/big needs one"):
        load_model("vidtok/big")
    with pytest.raises(ValueError, match="model='vidtalk/tiny': the tokenizers are"):
        load_model("vidtalk/tiny")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        detokenize(path, tmp_path / "back.mp4", model)
    assert not list(tmp_path.glob("back.mp4*"))


def kept(windows):
    return torch.stack([(tokens.indices >= 0).float().mean() for tokens in windows])


def test_a_rate_keeps_that_share_and_the_file_shrinks(clip, tmp_path):
    torch.manual_seed(0)
    chooser = InfoTok("tiny").eval()
    sizes = {}
    for rate in (0.75, 0.25):
        made = tokenize(clip, tmp_path / "a.tokens", chooser, rate=rate)
        assert len(made) == 1 and abs(kept(made) - rate) < 0.02
        assert (
            torch.equal(Tokens.load(tmp_path / "a.tokens").indices, made[0].indices)
            and made[0].indices.dtype == torch.int32
        )
        sizes[rate] = (tmp_path / "a.tokens").stat().st_size
    n = made[0].indices.numel()
    # 16 bits for half of the positions
    assert sizes[0.25] < sizes[0.75] and sizes[0.75] - sizes[0.25] > 0.8 * n
    assert sizes[0.25] < n + 4096
    detokenize(tmp_path / "a.tokens", tmp_path / "back.mp4", chooser)
    assert read_video(tmp_path / "back.mp4").video.shape[1] == 40


def test_routers_and_strategies(clip, tmp_path):
    """Every choice is the model's; without a mean score "global_elbo" finds that of the video's windows
    first."""
    torch.manual_seed(0)
    model = InfoTok("tiny").eval()
    options = {"window": 17, "overlap": 3, "rate": 0.5}
    latent = tokenize(clip, tmp_path / "a.tokens", model, **options, router="latent")
    video = pixels(clip, 8)
    assert torch.equal(latent[1].indices, model.encode(video[:, :, 14:31], rate=0.5, router="latent").indices)
    assert not same(latent, tokenize(clip, tmp_path / "a.tokens", model, **options))
    seen = []
    made = tokenize(
        clip,
        tmp_path / "a.tokens",
        model,
        **options,
        router="latent",
        rate_strategy="global_elbo",
        progress=lambda done, total: seen.append((done, total)),
    )
    means = [
        model.scores(video[:, :, a:b], "latent").double().mean().item()
        for a, b in ((0, 17), (14, 31), (28, 40))
    ]
    assert made.info["elbo_mean"] == pytest.approx(sum(means) / 3) and seen == [(n, 6) for n in range(1, 7)]
    assert len({*kept(made).tolist()}) > 1
    again = tokenize(
        clip,
        tmp_path / "a.tokens",
        model,
        **options,
        router="latent",
        rate_strategy="global_elbo",
        elbo_mean=made.info["elbo_mean"],
    )
    assert same(again, made)
    for wrong in ({"router": "best"}, {"rate_strategy": "none"}, {"rate": 1.5}, {"selection": "topk"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            tokenize(clip, tmp_path / "a.tokens", model, **wrong)


def test_a_rate_needs_a_model_that_chooses(clip, model, tmp_path):
    with pytest.raises(ValueError, match="rate=0.5: vidtok models keep all"):
        tokenize(clip, tmp_path / "a.tokens", model, rate=0.5)


def test_variable_times_come_back(model, tmp_path):
    """NVIDIA/Megatron-Energon #148, NVIDIA/Isaac-GR00T #172: an event stays where it was."""
    times = Times(Fraction(1, 1000), (500, *(600 + 20 * n for n in range(19))), 1000)
    write_video(tmp_path / "a.mp4", torch.rand(3, 20, 16, 16), times=times)
    tokens = tokenize(tmp_path / "a.mp4", tmp_path / "a.tokens", model)
    assert tokens.times.seconds == times.seconds and tokens.info["fps"] == pytest.approx(20 / 0.5)
    detokenize(tmp_path / "a.tokens", tmp_path / "b.mp4", model)
    back = read_video(tmp_path / "b.mp4").times
    assert back.seconds == times.seconds and back.durations == times.durations


def test_a_constant_rate_is_asked_for(model, tmp_path):
    times = Times(Fraction(1, 1000), (0, 100, 500), 600)
    write_video(tmp_path / "a.mp4", torch.rand(3, 3, 16, 16), times=times)
    tokens = tokenize(tmp_path / "a.mp4", tmp_path / "a.tokens", model, fps=10)
    assert tokens.info["reading"] == {"fps": "10"} and tokens.info["frames"] == 6
    assert tokens.times.rate == 10
    assert reading_of(tokens.info) == {"fps": Fraction(10)}


def test_files_of_the_first_format_are_read(model, tmp_path):
    """As 0.1 wrote them: another name of the format, and no times."""
    model.encode(torch.rand(1, 3, 9, 16, 16)).save(tmp_path / "0")
    write_windows(tmp_path / "new", [tmp_path / "0"], {"fps": 10.0, "frames": 9})
    data = (tmp_path / "new").read_bytes()
    assert b"token windows 2" in data
    (tmp_path / "old").write_bytes(data.replace(b"token windows 2", b"token windows 1"))
    old = TokenWindows(tmp_path / "old")
    assert old.times is None and Tokens.load(tmp_path / "old").batch == 1
    detokenize(tmp_path / "old", tmp_path / "a.mp4", model)
    assert read_video(tmp_path / "a.mp4").times.seconds == pytest.approx([n / 10 for n in range(9)])


@pytest.mark.parametrize("link", ["same", "symbolic", "hard", "other path"])
def test_an_input_is_never_overwritten(clip, model, tmp_path, link):
    """WinFF/winff #110, slhck/ffmpeg-normalize #22, ytdl-org/youtube-dl #22023."""
    (tmp_path / "sub").mkdir()
    source = tmp_path / "clip.mp4"
    source.write_bytes(clip.read_bytes())
    output = {"same": source, "other path": tmp_path / "sub" / ".." / "clip.mp4"}.get(link, tmp_path / "o")
    if link == "symbolic":
        output.symlink_to(source)
    elif link == "hard":
        output.hardlink_to(source)
    with pytest.raises(ValueError, match=r"output: .* is the same file as video=.*, which would be lost"):
        tokenize(source, output, model)
    assert source.read_bytes() == clip.read_bytes() and not list(tmp_path.glob("*.parts"))


def test_tokens_are_not_overwritten_by_their_video(clip, model, tmp_path):
    tokenize(clip, tmp_path / "a.tokens", model, size=16)
    (tmp_path / "b").symlink_to(tmp_path / "a.tokens")
    with pytest.raises(ValueError, match="same file as tokens="):
        detokenize(tmp_path / "a.tokens", tmp_path / "b", model)
    assert len(TokenWindows(tmp_path / "a.tokens")) == 3


def test_two_runs_with_one_output(clip, model, tmp_path):
    """huggingface/lerobot #4526, #2488: the second one is told so, and the first one is not disturbed."""
    from vtok_fast.commands.resumable import Parts

    refused = []

    def another(done, total):
        with pytest.raises(OSError, match=r"a\.tokens: another run is writing it \(it works in .*\.parts\)"):
            tokenize(clip, tmp_path / "a.tokens", model, size=16)
        refused.append(done)

    tokenize(clip, tmp_path / "a.tokens", model, size=16, progress=another)
    assert refused == [1, 2, 3] and os.listdir(tmp_path) == ["a.tokens"]
    with Parts(tmp_path / "b", {}):  # another output is nobody's business, and a lock ends with its run
        tokenize(clip, tmp_path / "a.tokens", model, size=16)
    assert os.listdir(tmp_path) == ["a.tokens"]


def test_what_is_damaged_is_listed(clip, model, tmp_path):
    import av

    packet = [bytes(packet) for packet in av.open(str(clip)).demux(video=0) if packet.size][20]
    data = clip.read_bytes()
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data.replace(packet, bytes(len(packet))))
    with pytest.raises(VideoError, match=r"broken\.mp4: frame 20 at 1\.600 s"):
        tokenize(broken, tmp_path / "a.tokens", model, size=16)
    skipped = tokenize(broken, tmp_path / "a.tokens", model, size=16, on_error="skip")
    left = skipped.info["left_out"]
    assert left[0]["frame"] == 20 and left[0]["time"] == pytest.approx(1.6) and left[0]["what"]
    assert skipped.info["frames"] == 40 - sum(one["count"] for one in left) == len(skipped.times)
    kept = tokenize(broken, tmp_path / "b.tokens", model, size=16, on_error="conceal")
    assert kept.info["frames"] == 40 and kept.info["concealed"][0]["frame"] == 20
    assert kept.info["reading"] == {"on_error": "conceal"} and "left_out" not in kept.info
