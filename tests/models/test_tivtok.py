"""TivTok: the paper's token counts, what each token sees, chunks that share invariant tokens, SoftVQ, and the
common contract."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.tokenizer_contract import (
    check_acceleration,
    check_autocast,
    check_compile,
    check_files,
    check_gradients,
    check_learning,
    check_refusals,
    check_stream,
    check_tokens,
    clip,
    randomize,
)

import vtok_fast
from vtok_fast.models import TivTok, TivTokConfig
from vtok_fast.models.tivtok import model as implementation
from vtok_fast.models.tivtok.quantizer import SoftVQ

SMALL = {
    "frames": 8,
    "patch": (2, 4, 4),
    "dim": 24,
    "depth": 2,
    "heads": 2,
    "mlp_ratio": 2.0,
    "tiv": 6,
    "tv": 2,
    "latent_dim": 5,
    "codebook": 32,
}
FSQ = {"quantizer": "fsq", "levels": (8, 8, 5, 5, 5)}
KINDS = [
    {},
    FSQ,
    {"quantizer": "none"},
    {"scope": "dense"},
    {"patch_scope": "patches"},
    {"patch_scope": "all"},
    {"chunks_per_set": 1, "merge": "after", "normalize": False},
    {"rotary_split": (8, 2, 2), "tv_position": "none", "decoder_time": True},
    {"tiv_position": "cell", "tv_position": "cell", "decoder_time": True},
]


def make(**fields) -> TivTok:
    return randomize(TivTok(**{**SMALL, **fields}))


# The paper


@pytest.mark.parametrize(
    ("name", "counts"), [("t128", (128, 160, 352)), ("t512", (512, 640, 1408)), ("t1024", (1024, 1280, 2816))]
)
def test_token_counts_of_the_paper(name, counts):
    with torch.device("meta"):
        model = TivTok(name)
    assert tuple(model.num_tokens(frames, 256, 256) for frames in (16, 32, 128)) == counts
    c = model.config
    assert (c.patch, c.dim, c.depth, c.frames) == ((4, 8, 8), 768, 12, 16)
    assert c.tokens_per_chunk * c.latent_dim == 16384
    assert c.tiv == 3 * c.slices * c.tv


def test_sets_of_invariant_tokens():
    """Table 4 of the paper: 1, 2, 4, 8 sets for the 8 chunks of 128 frames."""
    with torch.device("meta"):
        models = [
            TivTok(TivTokConfig(**TivTokConfig.presets["t128"], chunks_per_set=n)) for n in (8, 4, 2, 1)
        ]
    counts = [model.num_tokens(128, 256, 256) for model in models]
    assert counts == [352, 448, 640, 1024]


def test_scopes_of_the_paper():
    mask = implementation.encoder_scope(96, 8, 1024, 4, TivTokConfig.get("t128").patch_scope).mask()
    assert mask.shape == (4224, 4224) and mask.sum() == 4224 * 96 + 4 * 1032**2 + 96 * 4 * 1032
    assert 0.28 < mask.double().mean() < 0.29


@pytest.mark.parametrize("patch_scope", ["slice", "patches", "all"])
def test_scopes_token_by_token(patch_scope):
    config = TivTokConfig(**{**SMALL, "patch_scope": patch_scope})
    slices, patches = 3, 4
    kinds = [("TIV", None)] * 6
    for t in range(slices):
        kinds += [("TV", t)] * 2 + [("X", t)] * patches
    table = {  # key kind -> whether it is seen from the same slice, from another slice
        "TIV": {"TIV": (1, 1), "TV": (1, 1), "X": (1, 1)},
        "TV": {"TIV": (1, 1), "TV": (1, 0), "X": (1, 0)},
        "X": {
            "slice": {"TIV": (1, 1), "TV": (1, 0), "X": (1, 0)},
            "patches": {"TIV": (0, 0), "TV": (0, 0), "X": (1, 0)},
            "all": {"TIV": (1, 1), "TV": (1, 1), "X": (1, 1)},
        }[patch_scope],
    }
    expected = [[bool(table[q][k][0 if tq == tk else 1]) for k, tk in kinds] for q, tq in kinds]
    assert torch.equal(
        implementation.encoder_scope(6, 2, patches, slices, patch_scope).mask(), torch.tensor(expected)
    )
    q, k, v = torch.randn(
        3, 2, 2, len(kinds), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    y = implementation.attend_by_scope(config, slices, patches)(q, k, v)
    for i, seen in enumerate(expected):
        keys = torch.tensor(seen)
        alone = F.scaled_dot_product_attention(q[:, :, i : i + 1], k[:, :, keys], v[:, :, keys])
        torch.testing.assert_close(y[:, :, i : i + 1], alone, rtol=1e-12, atol=1e-13)


# What depends on what


def test_a_slice_reaches_another_only_through_the_invariant_tokens():
    """One layer deep, the tokens of slice t depend on no other slice; the invariant tokens depend on all."""
    model, video = make(depth=1), clip(1, 3, 8, 8, 8)
    changed = video.clone()
    changed[:, :, 2:4] *= -1  # slice 1
    tiv, tv = model.encoder(video)
    tiv_changed, tv_changed = model.encoder(changed)
    others = [0, 2, 3]
    assert torch.equal(tv[:, others], tv_changed[:, others])
    assert not torch.isclose(tv[:, 1], tv_changed[:, 1]).all() and not torch.isclose(tiv, tiv_changed).all()
    dense = make(depth=1, scope="dense")
    assert not torch.isclose(dense.encoder(video)[1][:, 0], dense.encoder(changed)[1][:, 0]).all()


def test_a_slice_is_decoded_from_its_own_tokens():
    """Swapping the variant tokens of two slices swaps these slices, and changes no other."""
    model = make().double()
    tokens = model.encode(clip(1, 3, 8, 8, 12, dtype=torch.float64))
    video = model.decode(tokens)
    row = tokens.latents.clone()
    # TV of slices 0 and 2
    row[..., 6:8], row[..., 10:12] = (
        tokens.latents[..., 10:12],
        tokens.latents[..., 6:8],
    )
    swapped = model._decode(row, (8, 8, 12))
    expected = torch.cat((video[:, :, 4:6], video[:, :, 2:4], video[:, :, 0:2], video[:, :, 6:8]), dim=2)
    torch.testing.assert_close(swapped, expected, rtol=1e-12, atol=1e-12)
    assert not torch.isclose(video[:, :, 0:2], video[:, :, 4:6]).all()


def test_order_of_rows_and_columns_matters():
    """The rotary embedding tells positions apart: a mirrored clip has other tokens, and not the same ones in
    another order."""
    model, video = make(quantizer="none"), clip(1, 3, 2, 8, 12)
    a, b = model.encode(video).latents, model.encode(video.flip(3)).latents
    assert not torch.isclose(a, b, rtol=1e-3).all()


def test_a_decoder_that_knows_the_time_makes_other_frames_of_the_same_tokens():
    for decoder_time in (False, True):
        model = make(decoder_time=decoder_time, quantizer="none").double()
        row = torch.randn(
            1, 5, 1, 1, 6 + 5 * 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        row[..., 6:] = row[..., 6:8].repeat(1, 1, 1, 1, 5)
        video = model._decode(row, (10, 8, 8))
        # The first slices of two chunks
        torch.testing.assert_close(video[:, :, :2], video[:, :, 8:], rtol=1e-12, atol=1e-12)
        assert torch.isclose(video[:, :, :2], video[:, :, 2:4]).all() == (not decoder_time)


def test_learned_queries_are_for_one_size():
    model = make(query_grid=(2, 3))
    assert model.decoder.patch_queries.shape == (6, 24)
    check_gradients(model, clip(1, 3, 4, 8, 12))
    with pytest.raises(ValueError, match=r"video is 8x8, a model with query_grid=\(2, 3\) takes 8x12"):
        model.encode(clip(1, 3, 4, 8, 8))


# Chunks


@pytest.mark.parametrize("frames", [16, 24, 21])
def test_chunks_share_the_mean_of_their_invariant_tokens(frames):
    """Tokens of a long clip = the mean of the chunks' TIV, and each chunk's TV; frames = each chunk decoded
    with that mean."""
    model, video = make(quantizer="none").double(), clip(2, 3, frames, 8, 8, dtype=torch.float64)
    parts = [video[:, :, start : start + 8] for start in range(0, frames, 8)]
    latents = [model.encode(part).latents[:, :, 0, 0] for part in parts]
    tiv = torch.stack([part[..., :6] for part in latents]).mean(0)
    expected = torch.cat([tiv, *[part[..., 6:] for part in latents]], dim=-1)
    tokens = model.encode(video)
    torch.testing.assert_close(tokens.latents[:, :, 0, 0], expected, rtol=1e-12, atol=1e-12)
    assert tokens.latents.shape[-1] == 6 + -(-frames // 2) * 2
    decoded = [
        model._decode(torch.cat((tiv, part[..., 6:]), -1)[:, :, None, None], tuple(clip_part.shape[2:]))
        for part, clip_part in zip(latents, parts)
    ]
    torch.testing.assert_close(model.decode(tokens), torch.cat(decoded, dim=2), rtol=1e-12, atol=1e-12)


def test_chunks_apart_are_chunks_alone():
    model, video = make(chunks_per_set=1).double(), clip(1, 3, 20, 8, 8, dtype=torch.float64)
    expected = torch.cat([model(video[:, :, start : start + 8]) for start in (0, 8, 16)], dim=2)
    torch.testing.assert_close(model(video), expected, rtol=1e-12, atol=1e-12)
    assert model.num_tokens(20, 8, 8) == 3 * 6 + 10 * 2


def test_groups_of_chunks_and_slices_change_nothing(monkeypatch):
    model, video = make().double(), clip(1, 3, 40, 8, 8, dtype=torch.float64)
    expected = model(video)
    monkeypatch.setattr(implementation, "CHUNKS_AT_ONCE", 2)
    monkeypatch.setattr(implementation, "SLICES_AT_ONCE", 3)
    torch.testing.assert_close(model(video), expected, rtol=1e-12, atol=1e-12)


# SoftVQ


@pytest.mark.parametrize("normalize", [True, False])
def test_softvq_by_its_formula(normalize):
    torch.manual_seed(0)
    layer = SoftVQ(
        2, 7, 3, temperature=0.3, normalize=normalize, entropy_weight=0.5, entropy_temperature=0.8
    ).double()
    z = torch.randn(2, 6, 3, dtype=torch.float64)
    codes, loss = layer(z, loss=True)
    token_entropy, mean = [], torch.zeros(2, 7, dtype=torch.float64)
    for b in range(2):
        for n in range(6):
            words, token = layer.codebook[n // 3].detach(), z[b, n]
            if normalize:
                words, token = words / words.norm(dim=1, keepdim=True), token / token.norm()
            p = torch.softmax(words @ token / 0.3, 0)
            torch.testing.assert_close(codes[b, n], p @ words)
            q = torch.softmax(words @ token / 0.8, 0)
            token_entropy.append(torch.special.entr(q).sum())
            mean[n // 3] += q / 6
    spread = -(mean * (mean + 1e-5).log()).sum(1).mean()
    torch.testing.assert_close(loss, 0.5 * (torch.stack(token_entropy).mean() - spread))


def test_softvq_sharpens_to_the_nearest_codeword():
    torch.manual_seed(0)
    layer = SoftVQ(1, 9, 4, temperature=1e-6)
    z = torch.randn(1, 5, 4)
    words = F.normalize(layer.codebook[0], dim=-1)
    nearest = (F.normalize(z[0], dim=-1) @ words.T).argmax(1)
    torch.testing.assert_close(layer(z)[0][0], words[nearest])


def test_softvq_codewords_learn_from_the_mean_alone():
    torch.manual_seed(0)
    layer = SoftVQ(1, 5, 3, normalize=False).double()
    z = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    codes, _ = layer(z)
    p = torch.softmax(z.detach()[0] @ layer.codebook[0].detach().T / 0.07, -1)
    weights = torch.randn_like(codes)
    (codes * weights).sum().backward()
    torch.testing.assert_close(layer.codebook.grad[0], p.T @ weights[0])
    assert z.grad.abs().sum() > 0


# The common contract


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_tokens(fields, tmp_path):
    model = make(**fields)
    for frames in (1, 8, 19):
        check_tokens(model, clip(2, 3, frames, 8, 12), tmp_path / "tokens.safetensors")


@pytest.mark.parametrize("fields", [{}, FSQ], ids=str)
def test_files_and_refusals(fields, tmp_path):
    model, video = make(**fields), clip(1, 3, 8, 8, 8)
    check_files(model, video, tmp_path)
    check_refusals(model, video)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_gradients(fields):
    check_gradients(make(**fields), clip(1, 3, 10, 8, 8))


def test_acceleration():
    """The attention's backends, and the quantizer's swap."""
    check_acceleration(make(), clip(1, 3, 10, 8, 12))
    report = vtok_fast.accelerate(make(**FSQ), example=clip(1, 3, 10, 8, 12))
    assert (
        "quantizer.fsq" in [entry.path for entry in report.swapped]
        and [tokens.ok for tokens in report.tokens] == [True] * 2
    )


def test_half_precision():
    model, video = make(), clip(1, 3, 10, 8, 8)
    tokens = model.bfloat16().encode(video.bfloat16())
    assert tokens.latents.dtype == torch.bfloat16 and model.decode(tokens).dtype == torch.bfloat16
    check_autocast(make(), clip(1, 3, 10, 8, 8))


def test_stream():
    model = make()
    check_stream(model, clip(1, 3, 21, 8, 8), model.stream(model.config.frames))
    assert model.stream().size == 8 * model.config.frames  # whose chunks share their invariant tokens


@pytest.mark.slow
def test_compile():
    """With one break, where the scope is made."""
    check_compile(make(), clip(1, 3, 10, 8, 8), fullgraph=False)


def test_learning():
    torch.manual_seed(0)
    model = TivTok("tiny")
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    ramp = torch.linspace(-1, 1, 32)
    video = (
        (ramp[:, None] * torch.linspace(0.5, 1, 16)[:, None, None] + 0 * ramp)
        .expand(1, 3, 16, 32, 32)
        .contiguous()
    )
    check_learning(model, video, steps=24, learning_rate=2e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"config": "t256"}, "t256.*t128"),
        ({"color": "blue"}, "color"),
        ({"frames": 7}, "frames=7.*2 frames"),
        ({"patch": (2, 4, 8)}, r"patch=\(2, 4, 8\)"),
        ({"scope": "wide"}, "scope='wide'"),
        ({"patch_scope": "wide"}, "patch_scope='wide'"),
        ({"quantizer": "vq"}, "quantizer='vq'"),
        ({"levels": (8, 8)}, "levels=.*softvq"),
        ({"quantizer": "fsq", "levels": (8, 8)}, "latent_dim=5"),
        ({**FSQ, "merge": "after"}, "merge='after'"),
        ({"tiv": 7}, "tiv_codebooks=3.*tiv=7"),
        ({"chunks_per_set": 0}, "chunks_per_set=0"),
        ({"heads": 5}, "heads=5"),
        ({"rotary_split": (4, 4, 2)}, r"rotary_split=\(4, 4, 2\)"),
        ({"query_grid": (2,)}, "query_grid="),
        ({"dim": 12, "heads": 3}, "heads=3.*dim=12"),
    ],
)
def test_impossible_structures(fields, message):
    with pytest.raises(ValueError, match=message):
        TivTok(**fields) if "config" in fields else TivTok(**{**SMALL, **fields})
