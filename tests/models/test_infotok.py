"""InfoTok: structure, choosing tokens, the packed stream, what it refuses, windows, learning, acceleration.

test_golden.py compares it with the official code.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support import tokenizer_contract as contract

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import Cosmos, InfoTok, InfoTokConfig
from vtok_fast.models.infotok.model import DROPPED, frame_budgets, frame_rates
from vtok_fast.models.infotok.transformer import Attention, Block, block_causal_mask, rotary_angles
from vtok_fast.ops.token_packing.packed_tokens import PackedTokens

SMALL = {
    "channels": 8,
    "channels_mult": (1, 1, 2),
    "num_res_blocks": 1,
    "z_channels": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_attention_heads": 2,
    "levels": (8, 5, 5),
}


def make(**fields) -> InfoTok:
    # So that frames differ behind the quantizer
    return contract.randomize(InfoTok(**{**SMALL, **fields}), std=0.3)


def kept(tokens) -> list[int]:
    return (tokens.indices != DROPPED).flatten(1).sum(1).tolist()


# Structure


def test_the_released_model():
    with torch.device("meta"):
        model = InfoTok("flex-4x8x8")
    assert sum(p.numel() for p in model.parameters()) == 123_142_646 and len(model.state_dict()) == 473
    assert (
        model.codebook_size == 64000
        and model.num_tokens(33, 256, 256) == 9216
        and model.num_tokens(81, 240, 432) == 34_020
    )
    state = model.state_dict()
    shapes = {
        "temporal_embed": (49, 256),
        "vit_encoder.7.attention.mha.in_proj_weight": (768, 256),
        "save_loss": (128,),
        "vit_decoder.0.mlp.w2.weight": (256, 512),
        "quantizer.implicit_codebook": (64000, 6),
    }
    for key, shape in shapes.items():
        assert state[key].shape == shape
    assert model.vit_encoder[0].attention.mha.head_dim == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 24}, "hidden_size=24 must equal z_channels=16"),
        ({"num_attention_heads": 8}, "num_attention_heads=8"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"rate_bins": ()}, "rate_bins="),
        ({"rate_strategy": "guess"}, "rate_strategy='guess'"),
        ({"router": "oracle"}, "router='oracle'"),
        ({"selection": "best"}, "selection='best'"),
        ({"formulation": "AE", "levels": None, "latent_channels": 4}, "formulation='AE'"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        InfoTok(**{**SMALL, **fields})


def test_choices_are_no_part_of_the_model():
    """Tokens say which model made them, not how many it was asked for."""
    video = contract.clip(1, 3, 5, 16, 16)
    tokens = make(rate=0.25, selection="topk", router="latent").encode(video)
    assert make(rate=1.0).decode(tokens).shape == video.shape
    with pytest.raises(ValueError, match="tokens come from"):
        make(theta=100.0).decode(tokens)


# The transformer


def test_attention_is_block_causal_and_projects_twice():
    """Against torch's own module: q and k projected and turned, v projected, all three handed to the module
    that holds the weights."""
    layer, angles = contract.randomize(Attention(16, 2)), rotary_angles(2, 3, 8, 10000.0)
    x = contract.clip(2, 18, 16)
    mha, blocked = layer.mha, ~block_causal_mask(3, 6)
    q, k, v = F.linear(x, mha.in_proj_weight, mha.in_proj_bias).chunk(3, dim=-1)
    complex_turn = torch.polar(torch.ones_like(angles), angles).repeat(3, 1)[:, None].to(torch.complex64)

    def turned(y):
        pairs = torch.view_as_complex(y.unflatten(-1, (2, 4, 2)).contiguous())
        return torch.view_as_real(pairs * complex_turn).flatten(-3)

    expected, _ = mha(turned(q), turned(k), v, attn_mask=blocked, need_weights=False)
    torch.testing.assert_close(layer(x, angles, 3), expected)
    changed = x.clone()
    changed[:, 6:] += 1
    assert torch.equal(layer(changed, angles, 3)[:, :6], layer(x, angles, 3)[:, :6])
    single = Attention(16, 2, twice=False)
    single.load_state_dict(layer.state_dict())
    assert not torch.allclose(single(x, angles, 3), expected, atol=1e-3)


# Choosing tokens


@pytest.mark.parametrize("selection", ["threshold", "topk", "order", "order_strided"])
@pytest.mark.parametrize("router", ["decode", "latent"])
def test_rates(selection, router):
    """Exact counts, that of the released code for its own threshold; what is kept scored at least as high as
    what is not."""
    model, video = make(selection=selection, router=router), contract.clip(2, 3, 9, 32, 32)
    scores = model.scores(video)
    n = scores[0].numel()
    previous = torch.zeros_like(scores, dtype=torch.bool)
    for rate in (0.0, 0.25, 0.5, 0.75, 1.0):
        tokens = model.encode(video, rate=rate)
        keep = tokens.indices != DROPPED
        if selection == "topk":
            assert kept(tokens) == [round(rate * n)] * 2
        elif selection == "threshold" and router == "decode":
            assert kept(tokens) == [n - 1 - int((1 - rate) * (n - 1))] * 2
        if not selection.startswith("order"):
            for clip in (0, 1):
                dropped = scores[clip][~keep[clip]]
                assert (
                    not len(dropped)
                    or not keep[clip].any()
                    or scores[clip][keep[clip]].min() >= dropped.max()
                )
        assert (keep | ~previous).all()  # more of the same
        previous = keep
    full = model.encode(video, rate=1.0, selection="topk").indices
    assert torch.equal(full[keep], tokens.indices[keep])


def test_scores_are_the_error_of_a_full_decode():
    model, video = make(), contract.clip(1, 3, 9, 16, 24)
    full = model.encode(video, rate=1.0, selection="topk")
    error = (video - model.decode(full)).abs().mean(1)
    frames = torch.cat((error[:, :1], error[:, 1:].unflatten(1, (-1, 4)).mean(2)), dim=1)
    expected = F.avg_pool2d(frames, 8)
    torch.testing.assert_close(model.scores(video), expected, rtol=1e-5, atol=1e-6)
    assert model.mean_score([video, contract.clip(2, 3, 5, 8, 8)]) == pytest.approx(
        (expected.mean().item() + sum(model.scores(contract.clip(2, 3, 5, 8, 8)).flatten(1).mean(1).tolist()))
        / 3
    )
    with pytest.raises(ValueError, match="there are none"):
        model.mean_score([])


def test_the_latent_router_needs_no_decode():
    model, video = make(router="latent", selection="topk"), contract.clip(1, 3, 9, 16, 16)
    video[:, :, 5:] = video[:, :, 4:5]
    calls = []
    model.decoder.register_forward_hook(lambda *_: calls.append(1))
    tokens = model.encode(video, rate=0.67)
    assert not calls and kept(tokens) == [8]
    assert (tokens.indices[:, 0] != DROPPED).all()  # the first frame has nothing before it
    scores = model.scores(video, router="latent")
    assert torch.equal(scores, model.scores(video)) and scores[:, 0].amin() == scores.amax()
    assert model.scores(contract.clip(1, 3, 1, 16, 16)).shape == (1, 1, 2, 2)


@pytest.mark.parametrize("selection", ["order", "order_strided"])
def test_the_even_router_does_not_look(selection):
    model = make(router="even", selection=selection)
    videos = torch.cat((contract.clip(1, 3, 9, 32, 32), 0.1 * contract.clip(1, 3, 9, 32, 32, seed=2)))
    keep = model.encode(videos, rate=0.5).indices != DROPPED
    assert torch.equal(keep, keep[:1, :1].expand_as(keep))  # whatever the clip and the frame
    uneven = model.encode(videos, rate=0.55).indices[0] != DROPPED
    assert uneven.sum() == round(0.55 * uneven.numel()) and uneven.flatten(1).sum(1).tolist() == [9, 9, 8]
    assert (model.scores(videos) == 1).all()


def test_a_running_mean_that_never_ran():
    with pytest.raises(ValueError, match="no running mean"):
        make(rate_strategy="elbo_ema").encode(contract.clip(1, 3, 5, 16, 16))


def test_strategies():
    model, videos = (
        make(),
        torch.cat((contract.clip(1, 3, 5, 32, 32), 0.1 * contract.clip(1, 3, 5, 32, 32, seed=2))),
    )
    scores = model.scores(videos)
    means, n = scores.flatten(1).double().mean(1), scores[0].numel()
    mean = means.mean().item()

    def released(rate):
        return n - 1 - int((1 - rate) * (n - 1))

    for strategy, rates in (
        ("elbo", [0.5, 0.5]),
        ("global_elbo", [min(max(0.5 * m / mean, 1 / 16), 1) for m in means.tolist()]),
        ("bin", [min(max(round(2 * m / mean) / 4, 1 / 16), 1) for m in means.tolist()]),
    ):
        tokens = model.encode(videos, rate=0.5, rate_strategy=strategy, elbo_mean=mean)
        assert kept(tokens) == [released(rate) for rate in rates], strategy
    with pytest.raises(ValueError, match="elbo_mean"):
        model.encode(videos, rate_strategy="global_elbo")


def test_running_mean():
    """Training moves it, evaluation reads it."""
    model, video = make(rate_strategy="elbo_ema", decay=0.75), contract.clip(1, 3, 5, 16, 16)
    assert model.ema_loss.item() == 0
    model.train()
    model.reconstruct(video)
    first = model.ema_loss.item()
    assert first == pytest.approx(model.scores(video).mean().item(), rel=1e-5)
    model.reconstruct(0.5 * video)
    second = 0.75 * first + 0.25 * model.scores(0.5 * video).mean().item()
    assert model.ema_loss.item() == pytest.approx(second, rel=1e-5)
    model.eval()
    expected = model.encode(video, rate=0.5, rate_strategy="global_elbo", elbo_mean=second)
    assert torch.equal(model.encode(video, rate=0.5).indices, expected.indices)
    assert model.ema_loss.item() == pytest.approx(second, rel=1e-5)


def test_training_draws_the_rate_of_each_clip():
    model, video = make(rate_bins=(0.25, 0.75), selection="topk").train(), contract.clip(4, 3, 5, 16, 16)
    seen = {
        count
        for _ in range(6)
        for count in (model.reconstruct(video).indices != DROPPED).flatten(1).sum(1).tolist()
    }
    assert seen == {2, 6}
    assert (model.reconstruct(video, rate=0.5).indices != DROPPED).flatten(1).sum(1).tolist() == [4] * 4


def test_shares_of_frames():
    """Proportional to the mean score, at most 1, with the rate as their mean."""
    scores = torch.tensor([[8.0, 1.0, 1.0], [2.0, 1.0, 3.0], [0.0, 0.0, 0.0]])[:, :, None, None].expand(
        -1, -1, 2, 5
    )
    share = frame_rates(scores, torch.tensor([0.6, 0.5, 1.0]))
    torch.testing.assert_close(
        share, torch.tensor([[1.0, 0.4, 0.4], [0.5, 0.25, 0.75], [1.0, 1.0, 1.0]], dtype=torch.float64)
    )
    assert frame_budgets(scores, torch.tensor([18, 15, 30])).tolist() == [[10, 5, 5], [6, 3, 8], [10, 10, 10]]


# Encoding and decoding


def test_the_common_contract(tmp_path):
    contract.check_tokens(make(), contract.clip(2, 3, 7, 16, 8), tmp_path / "clip.tokens")
    contract.check_refusals(make(), contract.clip(1, 3, 5, 16, 16))


def test_a_dropped_token_is_zero_to_the_decoder():
    model, video = make(), contract.clip(1, 3, 5, 16, 16)
    tokens = model.encode(video, rate=0.5)
    keep = tokens.indices != DROPPED
    codes = model.quantizer.decode(model.encode(video, rate=1.0, selection="topk").indices) * keep.unsqueeze(
        1
    )
    expected = model.decoder(model.transform(model.vit_decoder, model.post_quant_conv(codes)))
    torch.testing.assert_close(model.decode(tokens), expected)
    result = model.reconstruct(video, rate=0.5)
    assert torch.equal(result.indices, tokens.indices) and torch.equal(result.codes == 0, codes == 0)


def test_packed_stream():
    model, video = make(), contract.clip(2, 3, 7, 16, 16)
    tokens = model.encode(video, rate=0.5)
    packed = model.pack(tokens)
    data = packed.to_bytes(model.codebook_size)
    bits, width = tokens.indices.numel(), 8  # 200 codes
    assert len(data) == 20 + 12 * 2 + -(-bits // 8) + -(-sum(kept(tokens)) * width // 8) + 4
    back = model.unpack(PackedTokens.from_bytes(data), video_shape=(7, 16, 16))
    assert torch.equal(back.indices, tokens.indices) and back.video_shape == tokens.video_shape
    assert torch.equal(model.decode(back), model.decode(tokens))
    whole = model.decode(packed)  # of 9 frames, the last two of which were filled up
    assert torch.equal(whole[:, :, :7], model.decode(tokens)) and whole.shape[2] == 9
    with pytest.raises(ValueError, match="positions"):
        model.unpack(packed, video_shape=(5, 16, 16))
    with pytest.raises(ValueError, match="codebook has 200"):
        model.decode(packed.with_values(packed.values + 200))
    with pytest.raises(ValueError, match="one size"):
        model.unpack(PackedTokens.cat([packed, model.pack(model.encode(contract.clip(1, 3, 1, 16, 16)))]))


def test_too_long_for_the_temporal_embedding():
    model = make(max_num_video_frames=2)
    assert model(contract.clip(1, 3, 5, 8, 8)).shape[2] == 5
    with pytest.raises(ValueError, match="6 frames, which are 3 latent ones"):
        model.encode(contract.clip(1, 3, 6, 8, 8))


def test_windows():
    """Three frames are shared, the earlier window weighing 3/4, 2/4, 1/4 in them."""
    model, video = make(), contract.clip(1, 3, 19, 8, 8)
    stream = model.stream(9)
    windows = stream.chunks(19)
    assert windows == [(0, 9), (6, 15), (12, 19)]
    tokens = [stream.encode_chunk(video[:, :, a:b], rate=0.5) for a, b in windows]
    result = torch.cat(
        [stream.decode_chunk(part, lookahead=after) for part, after in zip(tokens, [*tokens[1:], None])],
        dim=2,
    )
    parts = [model(video[:, :, a:b], rate=0.5) for a, b in windows]
    assert result.shape == video.shape
    assert torch.equal(result[:, :, :6], parts[0][:, :, :6]) and torch.equal(
        result[:, :, 9:12], parts[1][:, :, 3:6]
    )
    for i, weight in enumerate((0.75, 0.5, 0.25)):
        torch.testing.assert_close(
            result[:, :, 6 + i], weight * parts[0][:, :, 6 + i] + (1 - weight) * parts[1][:, :, i]
        )


# Files


def test_files(tmp_path):
    contract.check_files(make(), contract.clip(1, 3, 5, 16, 8), tmp_path)


def test_a_files_way_of_choosing_holds_unless_another_is_given(tmp_path):
    config = replace(InfoTokConfig.get("tiny"), rate=0.3, router="latent")
    InfoTok(config).save(tmp_path / "a.safetensors")
    loaded = InfoTok.from_checkpoint(tmp_path / "a.safetensors", "tiny").config
    assert (loaded.name, loaded.rate, loaded.router) == ("tiny", 0.3, "latent")
    loaded = InfoTok.from_checkpoint(tmp_path / "a.safetensors", {**config.to_dict(), "rate": 0.5}).config
    assert (loaded.rate, loaded.router) == (0.5, "latent")
    assert (
        InfoTok.from_checkpoint(tmp_path / "a.safetensors", InfoTokConfig.get("tiny")).config.router
        == "decode"
    )


def test_released_checkpoint_format(tmp_path):
    """The state dict under "model", its keys behind "network.", with an exponential mean of it that is not
    read."""
    model, video = make(), contract.clip(1, 3, 5, 16, 8)
    state = {f"network.{key}": value for key, value in model.state_dict().items()}
    torch.save({"model": {**state, "ema.whatever": torch.zeros(1)}, "iteration": 7}, tmp_path / "infotok.pt")
    assert torch.equal(InfoTok.from_checkpoint(tmp_path / "infotok.pt", model.config)(video), model(video))


def test_cosmos_is_another_system(tmp_path):
    make().save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="'infotok' model, not 'cosmos'"):
        Cosmos.from_checkpoint(tmp_path / "model.safetensors")


# Training and acceleration


@pytest.mark.parametrize(
    "choice", [{}, {"router": "latent", "selection": "topk"}, {"double_projection": False}]
)
def test_gradients(choice):
    torch.manual_seed(0)
    model = make(rate_bins=(0.75,), max_num_video_frames=2, **choice)
    contract.check_gradients(model, contract.clip(1, 3, 5, 16, 16))


def test_it_learns():
    torch.manual_seed(0)
    smooth = F.interpolate(contract.clip(1, 3, 3, 4, 4), (5, 16, 16), mode="trilinear")
    contract.check_learning(InfoTok(**SMALL), smooth, 30, 1e-2)


def test_router_gets_no_gradient():
    model, video = make(), contract.clip(1, 3, 5, 16, 16).requires_grad_()
    assert not model.scores(video).requires_grad
    codes, indices = model._bottleneck(video, {"rate": 0.5})
    (grad,) = torch.autograd.grad(codes.square().sum(), video)
    assert grad.any() and not codes.movedim(1, -1)[indices == DROPPED].any()


def outputs(module, *inputs) -> dict[str, torch.Tensor]:
    module.zero_grad()
    x = inputs[0].clone().requires_grad_()
    y = module(x, *inputs[1:])
    y.backward(contract.clip(*y.shape, seed=2).to(y.dtype))
    return {"y": y.detach(), "x": x.grad, **{name: p.grad.clone() for name, p in module.named_parameters()}}


def test_autocast():
    """The router compares a float32 video with a bfloat16 reconstruction."""
    model, video = make(), contract.clip(1, 3, 5, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode(video, rate=0.5).grid == (2, 2, 2)
        model.train().reconstruct(video, rate=0.75).video.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.needs_native
@pytest.mark.parametrize("twice", [True, False])
def test_the_accelerated_block_is_close(twice):
    module = contract.randomize(Block(32, 4, 48, eps=1e-5, twice=twice), std=0.3)
    x, angles = contract.clip(2, 3 * 15, 32), rotary_angles(3, 5, 8, 10000.0)
    with vtok_fast.backend("reference"):
        eager, ref64 = (
            outputs(module, x, angles, 3),
            outputs(copy.deepcopy(module).double(), x.double(), angles, 3),
        )
    with vtok_fast.accelerated(module) as report:
        assert [entry.path for entry in report.swapped] == ["", "attention", "mlp"], report
        fast = outputs(module, x, angles, 3)
    for key, expected in ref64.items():
        measured = parity.close(fast[key], expected, eager[key])
        assert measured.ok, f"{key}: {measured}"


@pytest.mark.needs_native
def test_acceleration():
    """Every block within its contract, tokens equal except for latents at a threshold, gradients as near to
    those in float64 as a float32 implementation must come. All tokens are kept: a score at the bound may fall
    to either side."""
    model, video = make(channels=16, rate=1.0, selection="topk"), contract.clip(1, 3, 5, 32, 32)
    expected = outputs(copy.deepcopy(model).double(), video.double())
    before, indices = model(video), model.encode(video).indices
    report = vtok_fast.accelerate(model, example=video)
    assert not [entry for entry in report.skipped if entry.error is not None], report
    assert {"Block", "Attention", "ResBlock", "HybridDown", "HybridUp", "FSQuantizer"} <= {
        entry.kind for entry in report.swapped
    }
    assert report.tokens and all(tokens.ok for tokens in report.tokens)
    assert torch.equal(model.encode(video).indices, indices)
    fast = outputs(model, video)
    for part in ("y", "x", "encoder", "decoder", "vit"):
        a, b = (
            torch.cat([v.double().flatten() for k, v in values.items() if k.startswith(part)])
            for values in (fast, expected)
        )
        assert (a - b).norm() <= 1e-5 * b.norm(), part
    report.revert()
    assert torch.equal(model(video), before)


def test_presets():
    for name in InfoTokConfig.presets:
        config = InfoTokConfig.get(name)
        assert InfoTokConfig.get(config.to_dict()) == config
    assert replace(InfoTokConfig.get("tiny"), rate=0.1) == InfoTokConfig.get("tiny")
    assert sum(p.numel() for p in InfoTok("tiny").parameters()) < 1_000_000
