"""VidTok chunk by chunk: equal to the whole video, in the memory of one chunk, with nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from vtok_fast.io.tokens import Tokens
from vtok_fast.models import VidTok

FSQ = {"ch": 8, "ch_mult": (1, 2, 2), "num_res_blocks": 1, "z_channels": 4, "levels": (8, 8, 5, 5)}
V1_1 = {"version": "1.1", "interpolation_mode": "trilinear"}
TWICE = {"tempo_ds": (1,), "tempo_us": (2,), "time_downsample_factor": 2}
KL = {"regularizer": "kl", "levels": None}


def make(**fields) -> VidTok:
    torch.manual_seed(0)
    model = VidTok(**{**FSQ, **fields}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def clip(frames: int, size: int = 16, batch: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


def encode(stream, video, size=8) -> list[Tokens]:
    return [stream.encode_chunk(video[:, :, a:b]) for a, b in stream.chunks(video.shape[2], size)]


def decode(stream, tokens, *, overlap=False) -> torch.Tensor:
    ahead = [*tokens[1:], None] if overlap else [None] * len(tokens)
    return torch.cat(
        [stream.decode_chunk(part, lookahead=after) for part, after in zip(tokens, ahead, strict=True)], dim=2
    )


@pytest.mark.parametrize(
    "fields", [{}, V1_1, {**V1_1, **TWICE}, {"version": "1.1"}], ids=["1.0", "1.1", "1.1 2x", "1.1 nearest"]
)
@pytest.mark.parametrize("size", [4, 8, 16])
def test_encoding_equals_the_whole(fields, size):
    for regularizer in ({}, KL):
        model, video = make(**fields, **regularizer), clip(25, batch=2)
        whole, parts = model.encode(video), Tokens.cat(encode(model.stream(), video, size))
        assert parts.video_shape == whole.video_shape and parts.grid == whole.grid
        if regularizer:
            assert error(parts.latents, whole.latents) < 1e-5
        else:
            assert torch.equal(parts.indices, whole.indices)


@pytest.mark.parametrize(
    ("fields", "overlap", "bounds"),
    [
        ({}, False, (0, 1e-5)),
        ({"version": "1.1"}, False, (0, 1e-5)),
        ({"version": "1.1"}, True, (0, 1e-5)),
        ({**V1_1, **TWICE}, True, (0, 1e-5)),
        ({**V1_1, **TWICE}, False, (1e-4, 0.2)),
        (V1_1, True, (1e-6, 0.02)),
        (V1_1, False, (1e-4, 0.2)),
    ],
    ids=["1.0", "nearest", "nearest ahead", "2x ahead", "2x", "4x ahead", "4x"],
)
def test_decoding(fields, overlap, bounds):
    """Equal where the documentation says so; elsewhere the known difference, which look-ahead makes
    smaller."""
    model, video = make(**fields), clip(25)
    stream = model.stream()
    result = decode(stream, encode(stream, video), overlap=overlap)
    low, high = bounds
    assert low <= error(result, model(video)) < high


def test_irregular_last_chunk():
    """15 frames: a last chunk of 6 comes back as 6 frames."""
    model, video = make(version="1.1"), clip(15)
    stream = model.stream()
    tokens = encode(stream, video)
    assert [part.video_shape[0] for part in tokens] == [1, 8, 6] and [part.grid[0] for part in tokens] == [
        1,
        2,
        2,
    ]
    assert decode(stream, tokens).shape == video.shape
    with pytest.raises(ValueError, match="6 frames.*next one needs a multiple of 4"):
        encode(make().stream(), video)
    with pytest.raises(ValueError, match=r"4 frames.*first one needs 1 \+ k \* 4"):
        make().stream().encode_chunk(clip(4))


def test_a_failed_chunk_leaves_the_stream_as_it_was():
    model, video = make(**V1_1), clip(17)
    expected = Tokens.cat(encode(model.stream(), video))
    stream = model.stream()
    first = stream.encode_chunk(video[:, :, :9])

    def fail(*_):
        raise RuntimeError("out of luck")

    # The last layer: all others have updated their caches by then
    hook = model.encoder.conv_out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        stream.encode_chunk(video[:, :, 9:])
    hook.remove()
    with pytest.raises(ValueError, match="NaN"):
        stream.encode_chunk(video[:, :, 9:] * float("nan"))
    with pytest.raises(ValueError, match=r"\(B, H, W\) is \(1, 8, 8\)"):
        stream.encode_chunk(video[:, :, 9:, :8, :8])
    second = stream.encode_chunk(video[:, :, 9:])
    assert torch.equal(Tokens.cat([first, second]).indices, expected.indices)


def test_streams_do_not_meet():
    """Two at once on one model, a whole video between, and a reset."""
    model, videos = make(**V1_1), (clip(17), -clip(17))
    expected = [model.encode(video).indices for video in videos]
    streams = [model.stream(), model.stream()]
    parts = [[], []]
    for start, end in streams[0].chunks(17, 4):
        for i in (0, 1):
            parts[i].append(streams[i].encode_chunk(videos[i][:, :, start:end]))
        assert torch.equal(model.encode(videos[0]).indices, expected[0])
    assert all(torch.equal(Tokens.cat(parts[i]).indices, expected[i]) for i in (0, 1))
    streams[0].reset()
    assert torch.equal(Tokens.cat(encode(streams[0], videos[1])).indices, expected[1])


def test_what_cannot_stream():
    with pytest.raises(ValueError, match="non-causal"):
        make(causal=False).stream()
    stream = make().stream()
    with pytest.raises(ValueError, match="size=6"):
        stream.chunks(9, 6)
    with pytest.raises(ValueError, match="frames=0"):
        stream.chunks(0)
    assert stream.chunks(1) == [(0, 1)] and stream.chunks(20, 16) == [(0, 1), (1, 17), (17, 20)]
    with pytest.raises(ValueError, match="nothing"):
        Tokens.cat([])


def peak_bytes(run) -> int:
    """The most bytes of tensors that `run` has alive at once, beyond those from before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    live = peak = 0
    events = (event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("fields", [{}, V1_1], ids=["1.0", "1.1"])
def test_memory_does_not_grow_with_the_length(fields):
    model = make(**fields)

    def run(frames):
        stream = model.stream()
        previous = None
        for start, end in stream.chunks(frames):
            tokens = stream.encode_chunk(torch.zeros(1, 3, end - start, 16, 16))
            if previous is not None:
                stream.decode_chunk(previous, lookahead=tokens if fields else None)
            previous = tokens
        stream.decode_chunk(previous)

    short = peak_bytes(lambda: run(33))
    assert short > 100_000
    assert peak_bytes(lambda: run(257)) <= 1.2 * short
    # The measure does see length
    assert peak_bytes(lambda: model(torch.zeros(1, 3, 257, 16, 16))) > 5 * short
