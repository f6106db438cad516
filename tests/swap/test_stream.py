"""vtok_fast.stream: the state of a pass is the stream's, and the results are those of the whole video."""

import copy
import threading

import pytest
import torch
from support import swap_contract as contract
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import VidTok

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")


def wan21():
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    )


def wan22():
    return diffusers.AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=12,
        z_dim=4,
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
    )


def cogvideox():
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 16, 16, 16), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )


def vidtok(**options):
    if not hasattr(diffusers, "AutoencoderVidTok"):
        pytest.skip("this diffusers has no AutoencoderVidTok")
    return diffusers.AutoencoderVidTok(
        **{"ch": 8, "ch_mult": [1, 2, 2, 2], "z_channels": 4, "num_res_blocks": 1} | options
    )


def make(kind, fast=True):
    torch.manual_seed(0)
    model = contract.randomize(kind())
    if fast:
        vtok_fast.accelerate(model, check=False)
    return model


KINDS = [wan21, wan22, cogvideox, vidtok]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
SIZE = (32, 32)


def latent_of(encoded):
    return encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded[0]


def run(stream, x, chunks, direction):
    if direction == "encode":
        return torch.cat([latent_of(stream.encode_chunk(x[:, :, start:end])) for start, end in chunks], 2)
    return torch.cat([stream.decode_chunk(x[:, :, start:end]) for start, end in chunks], 2)


def state_of(model):
    return [
        (n, k, id(v))
        for n, m in model.named_modules()
        for k, v in m.__dict__.items()
        if isinstance(v, (torch.Tensor, list, dict, bool)) and not k.startswith("_")
    ]


@kinds
@pytest.mark.parametrize("fast", [False, True], ids=["as shipped", "accelerated"])
@torch.no_grad()
def test_chunks_are_the_whole_video(kind, fast):
    model, shipped = make(kind, fast), make(kind, False)
    x, z = contract.noise(1, 3, 17, *SIZE), contract.noise(1, 4, 5, 2 if kind is wan22 else 4, 4)
    stream, double = vtok_fast.stream(model), copy.deepcopy(shipped).double()
    padded = x if kind is not vidtok else torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], 2)
    expected, ref64 = (latent_of(m.encode(v)) for m, v in ((shipped, padded), (double, padded.double())))
    assert (p := parity.close(run(stream, x, stream.chunks(17), "encode"), ref64, expected)).ok, p
    if kind is not vidtok:  # whose upsampling looks ahead
        expected, ref64 = (m.decode(v).sample for m, v in ((shipped, z), (double, z.double())))
        assert (p := parity.close(run(stream, z, stream.latent_chunks(5), "decode"), ref64, expected)).ok, p


@pytest.mark.parametrize("kind", [wan21, wan22, vidtok], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("plan", [(1, 4, 4, 4), (1, 8, 4), (1, 12), (13,), (5, 8)], ids=str)
def test_the_plan_does_not_matter_where_the_model_allows_it(kind, plan):
    model = make(kind)
    x, ends = contract.noise(1, 3, 13, *SIZE), torch.tensor(plan).cumsum(0).tolist()
    chunks = list(zip([0, *ends], ends))
    expected = run(vtok_fast.stream(model), x, [(0, 13)], "encode")
    torch.testing.assert_close(
        run(vtok_fast.stream(model), x, chunks, "encode"), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", [wan21, wan22], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("plan", [(1, 1, 1, 1), (1, 3), (2, 2), (4,)], ids=str)
def test_wan_decodes_any_plan(kind, plan):
    model = make(kind)
    z, ends = contract.noise(1, 4, 4, 4, 4), torch.tensor(plan).cumsum(0).tolist()
    y = run(vtok_fast.stream(model), z, list(zip([0, *ends], ends)), "decode")
    with torch.no_grad():
        torch.testing.assert_close(y, model.decode(z).sample, rtol=1e-4, atol=1e-4)
    assert y.shape[2] == 13


def test_vidtok_with_lookahead_is_the_librarys_own_chunks():
    model = make(vidtok)
    z = contract.noise(1, 4, 5, 4, 4)
    model.enable_tiling(64, 64)
    model.num_latent_frames_batch_size = 2
    with torch.no_grad():
        expected = model.decode(z)  # chunks [0, 1), [1, 3), [3, 5), each with one latent ahead
    stream = vtok_fast.stream(model)
    parts = [
        stream.decode_chunk(z[:, :, :1], lookahead=z[:, :, 1:]),
        stream.decode_chunk(z[:, :, 1:3], lookahead=z[:, :, 3:]),
        stream.decode_chunk(z[:, :, 3:]),
    ]
    torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-4, atol=1e-4)
    assert [p.shape[2] for p in parts] == [1, 8, 8]


def test_vidtok_gives_tokens():
    model = make(lambda: vidtok(double_z=False, regularizer="fsq", codebook_size=4096))
    x, stream = contract.noise(1, 3, 9, *SIZE), vtok_fast.stream(model)
    tokens = torch.cat(
        [stream.encode_chunk(x[:, :, start:end])[1] for start, end in ((0, 1), (1, 5), (5, 9))], 1
    )
    with torch.no_grad():
        _, expected = model.encode(torch.cat([x[:, :, :1].expand(-1, -1, 3, -1, -1), x], 2))
    assert torch.equal(tokens, expected)


@kinds
def test_two_streams_do_not_disturb_each_other_or_the_model(kind):
    model = make(kind)
    a, b = contract.noise(1, 3, 9, *SIZE), contract.noise(2, 3, 9, *SIZE, seed=5)
    za, zb = contract.noise(1, 4, 3, 4, 4), contract.noise(2, 4, 3, 4, 4, seed=6)
    plans = ((0, 1), (1, 9)), ((0, 1), (1, 3))
    with torch.no_grad():
        alone = [
            (
                run(vtok_fast.stream(model), x, plans[0], "encode"),
                run(vtok_fast.stream(model), z, plans[1], "decode"),
            )
            for x, z in ((a, za), (b, zb))
        ]
        before = state_of(model)
        first, second = vtok_fast.stream(model), vtok_fast.stream(model)
        parts = [[], [], [], []]
        for (s, e), (zs, ze) in zip(*plans):  # in turns, with the model's own work in between
            parts[0].append(latent_of(first.encode_chunk(a[:, :, s:e])))
            parts[1].append(latent_of(second.encode_chunk(b[:, :, s:e])))
            parts[2].append(first.decode_chunk(za[:, :, zs:ze]))
            parts[3].append(second.decode_chunk(zb[:, :, zs:ze]))
            assert state_of(model) == before
            model.encode(b[:, :, :1] if kind is not vidtok else b[:, :, :4])
            before = state_of(model)
        done = [torch.cat(p, 2) for p in parts]
    for y, e in zip(done, (alone[0][0], alone[1][0], alone[0][1], alone[1][1])):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)


@kinds
def test_an_exception_leaves_the_stream_and_the_model_as_they_were(kind):
    model = make(kind)
    x, z = contract.noise(1, 3, 9, *SIZE), contract.noise(1, 4, 3, 4, 4)
    plans = ((0, 1), (1, 9)), ((0, 1), (1, 3))
    expected = (
        run(vtok_fast.stream(model), x, plans[0], "encode"),
        run(vtok_fast.stream(model), z, plans[1], "decode"),
    )
    stream, parts = vtok_fast.stream(model), ([], [])
    for (s, e), (zs, ze) in zip(*plans):
        before = state_of(model)
        handles = [
            m.register_forward_pre_hook(lambda *a: (_ for _ in ()).throw(KeyError("stop")))
            for m in (model.encoder.conv_out, model.decoder.conv_out)
        ]
        if kind not in (wan21, wan22):  # there conv_out is part of a swap, which calls no hooks
            for call, chunk in ((stream.encode_chunk, x[:, :, s:e]), (stream.decode_chunk, z[:, :, zs:ze])):
                with pytest.raises(KeyError):
                    call(chunk)
        [handle.remove() for handle in handles]
        with pytest.raises(Exception):  # wrong channels, found deep inside
            stream.encode_chunk(x[:, :1, s:e])
        assert state_of(model) == before
        parts[0].append(latent_of(stream.encode_chunk(x[:, :, s:e])))
        parts[1].append(stream.decode_chunk(z[:, :, zs:ze]))
    for p, e in zip(parts, expected):
        torch.testing.assert_close(torch.cat(p, 2), e, rtol=1e-4, atol=1e-4)


@pytest.mark.volatile
@kinds
def test_streams_in_threads(kind):
    model = make(kind)
    videos = [contract.noise(1, 3, 9, *SIZE, seed=i) for i in range(3)]
    expected = [run(vtok_fast.stream(model), x, ((0, 1), (1, 5), (5, 9)), "encode") for x in videos]
    results = [None] * 3

    def work(i):
        results[i] = run(vtok_fast.stream(model), videos[i], ((0, 1), (1, 5), (5, 9)), "encode")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for y, e in zip(results, expected):
        torch.testing.assert_close(y, e, rtol=1e-4, atol=1e-4)


def test_reset_begins_a_new_video():
    stream = vtok_fast.stream(make(wan21))
    x = contract.noise(1, 3, 5, *SIZE)
    expected = latent_of(stream.encode_chunk(x))
    with pytest.raises(
        ValueError, match=r"video: \(B, H, W\) is \(1, 16, 16\), in the chunk before it was \(1, 32, 32\)"
    ):
        stream.encode_chunk(contract.noise(1, 3, 4, 16, 16))
    stream.reset()
    contract.near(latent_of(stream.encode_chunk(x)), expected)


def test_impossible_chunks_are_named():
    stream = vtok_fast.stream(make(wan21))
    for frames in (0, 2, 4):
        with pytest.raises(ValueError, match=r"T = 1 \+ k \* 4 in the first chunk, got shape \(1, 3, "):
            stream.encode_chunk(torch.zeros(1, 3, frames, *SIZE))
    stream.encode_chunk(torch.zeros(1, 3, 1, *SIZE))
    with pytest.raises(ValueError, match="T = a multiple of 4 in the next chunk"):
        stream.encode_chunk(torch.zeros(1, 3, 5, *SIZE))
    stream = vtok_fast.stream(make(cogvideox))
    stream.decode_chunk(torch.zeros(1, 4, 3, 4, 4))
    with pytest.raises(ValueError, match="latent: .* a multiple of 2, got shape"):
        stream.decode_chunk(torch.zeros(1, 4, 3, 4, 4))
    with pytest.raises(ValueError, match="frames: expected 1 \\+ k \\* 4, got 6"):
        stream.chunks(6)
    with pytest.raises(ValueError, match="latents: expected at least one, got 0"):
        vtok_fast.stream(make(wan21)).latent_chunks(0)


def test_models_that_cannot_stream_say_why():
    hunyuan = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4
    )
    with pytest.raises(TypeError, match="AutoencoderKLHunyuanVideo cannot stream: its norms"):
        vtok_fast.stream(hunyuan)
    with pytest.raises(TypeError, match="model: Conv3d cannot stream: no way"):
        vtok_fast.stream(nn.Conv3d(1, 1, 1))
    with pytest.raises(TypeError, match="model: expected an nn.Module, got str"):
        vtok_fast.stream("wan")
    with pytest.raises(TypeError, match="non-causal"):
        vtok_fast.stream(vidtok(is_causal=False))


def test_our_own_models_stream_as_they_do():
    model = VidTok("tiny").eval()
    assert type(vtok_fast.stream(model)) is type(model.stream())
