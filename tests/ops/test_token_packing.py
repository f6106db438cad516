"""token_packing: the router's definition; counts, order and ties; inverses, gradients, stored bytes; and
InfoTok's own numbers."""

import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import golden

import vtok_fast
from vtok_fast.dispatch import native
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.ops.token_packing import (
    PackedTokens,
    pack_tokens,
    router_scores,
    select_tokens,
    token_budget,
    unpack_tokens,
)
from vtok_fast.ops.token_packing import selection as token_selection
from vtok_fast.reference import token_packing as reference

GOLDEN = Path(__file__).resolve().parents[1] / "golden_data" / "token_packing_infotok.safetensors"
NARROW = (torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "reference") if native.lib() else ("reference",)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def poison():
    """Whatever the allocator hands out next is not what an op should have written."""
    return [torch.full((n,), float("nan")) for n in (1 << 10, 1 << 14, 1 << 18)]


# ---- scores ------------------------------------------------------------------------------------------------


def exact_score(a: torch.Tensor, b: torch.Tensor) -> float:
    """The definition in Python integers, one value after the other."""
    total = sum(
        int(min(abs(x - y), 4096.0) * 2**30) for x, y in zip(a.flatten().tolist(), b.flatten().tolist())
    )
    return total / (a.numel() * 2**30)


def test_scores_are_what_the_definition_says(backend):
    video = (torch.randn(2, 3, 9, 8, 12) * 100).half().float()  # differences of halves are exact in float32
    other = (torch.randn(2, 3, 9, 8, 12) * 10 ** torch.randn(2, 3, 9, 8, 12)).half().float()
    scores = router_scores(video, other, (4, 4, 6), backend=backend)
    assert scores.shape == (2, 3, 2, 2) and scores.dtype == torch.float32
    for b in range(2):
        for i, frames in enumerate((slice(0, 1), slice(1, 5), slice(5, 9))):
            for y in range(2):
                for x in range(2):
                    cell = b, slice(None), frames, slice(4 * y, 4 * y + 4), slice(6 * x, 6 * x + 6)
                    assert scores[b, i, y, x] == torch.tensor(
                        exact_score(video[cell], other[cell]), dtype=torch.float32
                    )


@pytest.mark.needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_scores_are_the_same_bits_on_every_instance(isa, dtype):
    for layout in ("contiguous", "channels_last", "mixed", "cropped", "transposed"):
        a, b = torch.randn(2, 2, 3, 9, 24, 40)
        b = b * 10 ** (2 * torch.randn_like(b))
        a[0, 0, 0, 3, 5], a[1, 2, 7, 9, 9] = math.nan, math.inf
        a, b = a.to(dtype), b.to(dtype)
        if layout in ("channels_last", "mixed"):
            a = a.contiguous(memory_format=torch.channels_last_3d)
            b = b.contiguous(memory_format=torch.channels_last_3d) if layout == "channels_last" else b
        if layout == "cropped":
            a, b = (torch.nn.functional.pad(v, (1, 3, 2, 1, 0, 1))[:, :, :9, 2:-1, 1:-3] for v in (a, b))
        if layout == "transposed":
            a, b = (v.transpose(3, 4).contiguous().transpose(3, 4) for v in (a, b))
        for grid in ((4, 8, 8), (2, 3, 5), (8, 24, 40), (1, 1, 1)):
            got, want = (router_scores(a, b, grid, backend=name) for name in ("cpu", "reference"))
            assert torch.equal(got.isnan(), want.isnan()) and got.isnan().sum() == 1
            assert torch.equal(got.nan_to_num(-1.0), want.nan_to_num(-1.0)), (layout, grid)


@pytest.mark.needs_native
def test_many_values_under_one_mean_stay_exact(isa):
    # 3 x 16 x 32 x 512 values of nearly 4096: more than a double adds up without rounding.
    a, b = 4096 - torch.rand(1, 3, 17, 32, 512), torch.zeros(1, 3, 17, 32, 512)
    assert torch.equal(
        router_scores(a, b, (16, 32, 512), backend="cpu"),
        router_scores(a, b, (16, 32, 512), backend="reference"),
    )


def test_scores_are_close_to_the_plain_mean(backend):
    a, b = torch.randn(2, 1, 3, 5, 16, 16)
    e = (a.double() - b.double()).abs().mean(1)
    plain = torch.cat([e[:, :1], e[:, 1:].unflatten(1, (-1, 4)).mean(2)], 1)
    plain = plain.unflatten(2, (-1, 8)).unflatten(4, (-1, 8)).mean((3, 5))
    scores = router_scores(a, b, backend=backend)
    # cutting loses at most 2^-30, the subtraction and the result round to float32
    assert ((scores.double() - plain).abs() <= 2**-30 + 2**-23 * plain).all()
    assert router_scores(a.double(), b.double()).dtype == torch.float64
    assert not router_scores(a.requires_grad_(), b).requires_grad


# ---- budget ------------------------------------------------------------------------------------------------


def test_budgets():
    scores = torch.rand(3, 2, 3, 4) * torch.tensor([1.0, 2.0, 8.0]).view(3, 1, 1, 1)
    assert (
        token_budget(scores, 0.5).tolist() == [12] * 3
        and token_budget(scores, 1.0, released=True).tolist() == [23] * 3
    )
    assert token_budget(scores, torch.tensor([0.0, 0.27, 7.0])).tolist() == [0, 6, 24]
    mean = scores.double().mean((1, 2, 3))
    share = lambda rate: [math.floor(24 * min(max(r, 1 / 16), 1) + 0.5) for r in rate.tolist()]  # noqa: E731
    assert token_budget(scores, 0.5, strategy="global_elbo", elbo_mean=1.0).tolist() == share(0.5 * mean)
    assert token_budget(scores, 0.5, strategy="bin", elbo_mean=1.0).tolist() == share((2 * mean).round() / 4)
    running = torch.tensor(math.nan)
    first = token_budget(scores, 0.5, strategy="elbo_ema", elbo_mean=running, decay=0.9)
    assert running.item() == pytest.approx(mean.mean().item()) and first.tolist() == share(
        0.5 * mean / mean.mean()
    )
    token_budget(scores * 3, 0.5, strategy="elbo_ema", elbo_mean=running, decay=0.9)
    assert running.item() == pytest.approx(mean.mean().item() * (0.9 + 0.1 * 3))
    assert token_budget(torch.empty(2, 0), 0.5).tolist() == [0, 0] and token_budget(
        torch.empty(0, 4), 0.5
    ).shape == (0,)
    scores[0, 0, 0, 0] = math.nan
    assert token_budget(scores, 0.5, strategy="global_elbo", elbo_mean=1.0)[0] == 24


@pytest.mark.parametrize("tokens", (1, 2, 36, 9216, 34020))
def test_released_count_is_that_of_the_released_threshold(tokens):
    scores = torch.randperm(tokens).float().view(1, -1)
    for rate in (1 / 16, 0.25, 1 / 3, 0.5, 0.75, 1.0):
        bound = torch.quantile(scores.float(), float(1 - torch.tensor(rate)))
        budget = token_budget(scores, rate, released=True)
        assert torch.equal(select_tokens(scores, budget, method="threshold"), scores > bound)


# ---- selection ---------------------------------------------------------------------------------------------


@st.composite
def scored(draw):
    """Scores with many ties, zeros of both signs, infinities and NaN, and a budget per clip."""
    clips, tokens = draw(st.integers(0, 4)), draw(st.integers(0, 70))
    values = draw(st.sampled_from(([0.0, -0.0, 1.0], [-math.inf, -1.5, 2.0, math.inf, math.nan], None)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if values is None:
        scores = torch.randn(clips, tokens, generator=generator)
    else:
        scores = torch.tensor(values)[torch.randint(len(values), (clips, tokens), generator=generator)]
    budget = torch.randint(tokens + 1, (clips,), generator=generator)
    return scores.to(draw(st.sampled_from(NARROW))), budget


def order_of(row: list[float]) -> list[int]:
    """Positions from the highest score down, NaN first, equals by position."""
    return sorted(
        range(len(row)), key=lambda i: (not math.isnan(row[i]), -row[i] if not math.isnan(row[i]) else 0.0, i)
    )


@settings(max_examples=150, deadline=None)
@given(scored())
def test_topk_and_threshold(case):
    scores, budget = case
    for backend in BACKENDS:
        waste = poison()
        topk = select_tokens(scores, budget, backend=backend)
        strict = select_tokens(scores, budget, method="threshold", backend=backend)
        del waste
        for row, k, keep, above in zip(scores.tolist(), budget.tolist(), topk.tolist(), strict.tolist()):
            order = order_of(row)
            assert [i for i, kept in enumerate(keep) if kept] == sorted(order[:k])
            key = lambda i: math.inf if math.isnan(row[i]) else math.atan(row[i])  # noqa: E731
            want = [True] * len(row) if k == len(row) else [key(i) > key(order[k]) for i in range(len(row))]
            assert above == want


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.integers(1, 7), st.data())
def test_orders(blocks, size, stride, data):
    lengths = torch.tensor([[data.draw(st.integers(0, size)) for _ in range(blocks)] for _ in range(2)])
    scores = torch.full((2, blocks, size), math.nan)  # only their shape counts
    prefix = select_tokens(scores, lengths, method="order")
    spread = select_tokens(scores, lengths, method="order_strided", stride=stride)
    ranks = sorted(range(size), key=lambda p: (p % stride, p // stride))
    for b in range(2):
        for i in range(blocks):
            k = int(lengths[b, i])
            assert prefix[b, i].tolist() == [p < k for p in range(size)]
            assert sorted(spread[b, i].nonzero().flatten().tolist()) == sorted(ranks[:k])
    assert torch.equal(select_tokens(scores, lengths[:, 0], method="order")[:, 0], prefix[:, 0])


def test_34020_tokens(backend):
    scores = (torch.randn(2, 21, 30, 54) * 50).round() / 50  # with ties
    keep = select_tokens(scores, [17010, 34019], backend=backend)
    assert keep.flatten(1).sum(1).tolist() == [17010, 34019]
    z = torch.randn(2, 6, 21, 30, 54)
    packed = pack_tokens(z, keep, backend=backend)
    assert packed.cu_seqlens.tolist() == [0, 17010, 51029]
    assert torch.equal(packed.values, z.movedim(1, -1)[keep])
    assert torch.equal(unpack_tokens(packed, shape=z.shape, backend=backend), z * keep.unsqueeze(1))


# ---- packing -----------------------------------------------------------------------------------------------

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@st.composite
def dense_tokens(draw):
    grid = tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    clips, channels = draw(st.integers(0, 3)), draw(st.sampled_from((None, 0, 1, 3, 6, 16, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (clips, *grid) if channels is None else (clips, channels, *grid)
    tokens = (torch.randn(shape, generator=generator) * 50).to(draw(st.sampled_from(DTYPES)))
    layout = draw(st.sampled_from(("contiguous", "channels last", "sliced")))
    if layout == "channels last" and channels is not None:
        tokens = tokens.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "sliced":
        tokens = torch.stack((tokens, tokens), -1)[..., 0]
    keep = torch.rand(clips, *grid, generator=generator) < draw(st.sampled_from((0.0, 0.3, 0.5, 0.9, 1.1)))
    return tokens, keep


@settings(max_examples=150, deadline=None)
@given(dense_tokens(), st.integers(0, 5))
def test_pack_and_unpack_are_inverse(case, room):
    tokens, keep = case
    last = tokens.movedim(1, -1) if tokens.dim() > keep.dim() else tokens
    total = int(keep.sum())
    for backend in BACKENDS:
        waste = poison()
        packed = pack_tokens(tokens, keep, backend=backend)
        bounded = pack_tokens(tokens, keep, capacity=total + room, backend=backend)
        dense = unpack_tokens(packed, shape=tokens.shape, fill=1, backend=backend)
        del waste
        assert packed.values.dtype == tokens.dtype and torch.equal(packed.values, last[keep])
        assert packed.cu_seqlens.tolist() == [0, *keep.flatten(1).sum(1).cumsum(0).tolist()]
        assert packed.cu_seqlens.dtype == packed.indices.dtype == torch.int32
        assert packed.indices.tolist() == [
            i for row in keep.flatten(1).tolist() for i, kept in enumerate(row) if kept
        ]
        assert torch.equal(bounded.values[:total], packed.values) and not bounded.values[total:].any()
        assert bounded.indices.tolist() == packed.indices.tolist() + [-1] * room
        where = keep.unsqueeze(1) if tokens.dim() > keep.dim() else keep
        assert torch.equal(dense, torch.where(where, tokens, torch.ones((), dtype=tokens.dtype)))
        assert torch.equal(unpack_tokens(bounded, fill=1, backend=backend), dense)
        again = pack_tokens(dense, keep, backend=backend)
        assert torch.equal(again.values, packed.values)


def test_unpacked_videos_have_their_channels_innermost(backend):
    z = torch.randn(2, 6, 3, 4, 5)
    dense = unpack_tokens(pack_tokens(z, torch.rand(2, 3, 4, 5) < 0.5), backend=backend)
    assert dense.is_contiguous(memory_format=torch.channels_last_3d)


def test_integer_positions_are_a_mask():
    z = torch.randn(2, 5, 3, 4)
    positions = torch.tensor([[11, 0, 3, 3], [2, -1, -1, 7]])
    packed = pack_tokens(z, positions)
    assert packed.indices.tolist() == [0, 3, 11, 2, 7] and packed.cu_seqlens.tolist() == [0, 3, 5]
    ids = torch.arange(24).view(2, 3, 4)
    assert pack_tokens(ids, positions).values.tolist() == [0, 3, 11, 14, 19]
    with pytest.raises(ValueError, match="keep: .*11, got 12"):
        pack_tokens(z, torch.tensor([[12], [0]]))


@pytest.mark.parametrize("capacity", (None, 40))
def test_fused_quantization_is_that_of_the_dense_video(capacity, backend):
    z, keep = torch.randn(2, 3, 3, 4, 5), torch.rand(2, 3, 4, 5) < 0.3
    packed = pack_tokens(z, keep, levels=[8, 5, 4], capacity=capacity, backend=backend)
    total = int(keep.sum())
    assert (
        torch.equal(packed.values[:total], fsq_quantize(z, [8, 5, 4]).indices[keep])
        and not packed.values[total:].any()
    )


def test_clips_of_different_sizes():
    grids = (3, 4, 5), (1, 2, 2), (5, 0, 3), (2, 7, 1)
    clips = [torch.randn(1, 6, *grid) for grid in grids]
    keeps = [torch.rand(1, *grid) < 0.5 for grid in grids]
    packed = pack_tokens(clips, keeps)
    assert packed.clips == 4 and packed.clip_grids == grids
    assert packed.cu_seqlens.diff().tolist() == [int(keep.sum()) for keep in keeps]
    for dense, clip, keep in zip(unpack_tokens(packed), clips, keeps):
        assert torch.equal(dense, (clip * keep.unsqueeze(1))[0])
    ids = [torch.randint(100, keep.shape) for keep in keeps]
    stored = pack_tokens(ids, keeps)
    back = PackedTokens.from_bytes(stored.to_bytes(100))
    assert (
        back.grids == grids
        and torch.equal(back.values, stored.values.int())
        and torch.equal(back.indices, stored.indices)
    )


def test_gradients(backend):
    keep = torch.rand(2, 3, 4, 5) < 0.5
    z = torch.randn(2, 4, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: pack_tokens(z, keep, backend=backend).values.square(), z)
    assert torch.autograd.gradcheck(
        lambda z: pack_tokens(z, keep, capacity=70, backend=backend).values.square(), z
    )
    packed = pack_tokens(z.detach(), keep)
    values = packed.values.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v: unpack_tokens(packed.with_values(v), fill=2.0, backend=backend).square(), values
    )
    assert torch.autograd.gradgradcheck(
        lambda z: unpack_tokens(pack_tokens(z, keep, backend=backend)).square(), z
    )
    (grad,) = torch.autograd.grad(unpack_tokens(pack_tokens(z, keep, backend=backend)).sum(), z)
    assert torch.equal(grad, keep.unsqueeze(1).expand_as(z).double())


def test_opcheck_and_compile(backend):
    keep, z = torch.rand(2, 3, 4) < 0.5, torch.randn(2, 5, 3, 4, requires_grad=True)
    ops, scores = torch.ops.vtok_fast, torch.rand(2, 3, 4)
    torch.library.opcheck(ops.pack_tokens, (z, keep, 30, None, "vidtok", backend))
    torch.library.opcheck(ops.pack_tokens, (z, keep, None, None, "vidtok", backend))
    torch.library.opcheck(ops.pack_tokens, (z.detach(), keep, 30, [8, 5, 4, 4, 4], "vidtok", backend))
    torch.library.opcheck(
        ops.unpack_tokens, (torch.randn(int(keep.sum()), 5, requires_grad=True), keep, 1.0, backend)
    )
    torch.library.opcheck(ops.select_tokens, (scores, torch.tensor([3, 9]), "topk", 4, None, backend))
    rates = torch.tensor([0.3, 0.9])
    torch.library.opcheck(ops.select_tokens, (scores, torch.tensor([3, 9]), "threshold", 4, rates, backend))
    torch.library.opcheck(
        ops.router_scores, (torch.randn(1, 3, 5, 8, 8), torch.randn(1, 3, 5, 8, 8), [4, 8, 8], backend)
    )

    def chain(video, other, z):
        scores = router_scores(video, other, (4, 4, 4))
        keep = select_tokens(scores, token_budget(scores, 0.5, strategy="global_elbo", elbo_mean=0.7))
        return unpack_tokens(pack_tokens(z, keep, capacity=keep.numel())) * 2

    args = torch.randn(2, 3, 5, 8, 12), torch.randn(2, 3, 5, 8, 12), torch.randn(2, 6, 2, 2, 3)
    assert torch.equal(torch.compile(chain, fullgraph=True, backend="aot_eager")(*args), chain(*args))


# ---- bytes -------------------------------------------------------------------------------------------------


def stored(codes=64000, clips=2, rate=0.5):
    grid = (3, 5, 7)
    return pack_tokens(torch.randint(codes, (clips, *grid)), torch.rand(clips, *grid) < rate)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2**31), st.integers(0, 3), st.sampled_from((0.0, 0.4, 1.1)))
def test_bytes_round_trip(codes, clips, rate):
    packed = stored(codes, clips, rate)
    data = packed.to_bytes(codes)
    back = PackedTokens.from_bytes(data)
    for name in ("values", "indices", "cu_seqlens", "mask"):
        assert torch.equal(getattr(back, name).long().flatten(), getattr(packed, name).long().flatten())
    assert back.clips == clips and back.clip_grids == packed.clip_grids and len(unpack_tokens(back)) == clips
    bits = (codes - 1).bit_length() * len(packed.values)
    assert len(data) == 20 + 12 * clips + (105 * clips + 7) // 8 + (bits + 7) // 8 + 4
    assert back.to_bytes(codes) == data


def test_bytes_are_the_documented_ones():
    packed = pack_tokens(torch.tensor([[[5, 6, 7]]]), torch.tensor([[[True, False, True]]]))
    body = b"VTKP\x01\x02\0\0" + struct.pack("<IQ2I", 1, 8, 1, 3) + bytes([0b101, 5 | 7 << 3])
    assert packed.to_bytes(8) == body + struct.pack("<I", zlib.crc32(body))


def test_truncated_and_damaged_bytes_are_rejected():
    data = stored().to_bytes(64000)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="data: "):
            PackedTokens.from_bytes(data[:size])
    for at in range(len(data)):
        with pytest.raises(ValueError, match="data: "):
            PackedTokens.from_bytes(data[:at] + bytes([data[at] ^ (1 + at % 255)]) + data[at + 1 :])
    with pytest.raises(ValueError, match="data: "):
        PackedTokens.from_bytes(data + b"\0")


@pytest.mark.parametrize(
    "at, change, message",
    [
        (4, b"\x02", "version 2"),
        (8, struct.pack("<I", 2**31), "impossible header"),
        (12, struct.pack("<Q", 0), "impossible header"),
        (12, struct.pack("<Q", 2**40), "impossible header"),
        (20, struct.pack("<I", 2**32 - 1), "do not fit"),
        (20, struct.pack("<I", 4), "expected .* bytes"),
        (12, struct.pack("<Q", 40000), "of 40000 codes"),
    ],
)
def test_impossible_headers_with_a_right_checksum_are_rejected(at, change, message):
    data = bytearray(stored().to_bytes(64000))
    data[at : at + len(change)] = change
    data[-4:] = struct.pack("<I", zlib.crc32(bytes(data[:-4])))
    with pytest.raises(ValueError, match=f"data: .*{message}"):
        PackedTokens.from_bytes(bytes(data))


def test_what_cannot_be_stored_is_named():
    packed = stored(100)
    with pytest.raises(ValueError, match="values: expected 0 to 9"):
        packed.to_bytes(10)
    with pytest.raises(ValueError, match="values: .*got -1"):
        packed.with_values(packed.values - 1 - packed.values.max()).to_bytes(100)
    with pytest.raises(TypeError, match="values: .*float32"):
        packed.with_values(packed.values.float()).to_bytes(100)
    with pytest.raises(ValueError, match="codes: .*0"):
        packed.to_bytes(0)
    bounded = pack_tokens(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool), capacity=9)
    assert PackedTokens.from_bytes(bounded.to_bytes(2)).values.tolist() == [1] * 4


# ---- InfoTok's own numbers ---------------------------------------------------------------------------------


def test_scores_masks_and_counts_of_the_official_code(backend):
    data = golden.Golden.load(GOLDEN)
    given, want = data.under("in/router"), data.under("out/router")
    scores = router_scores(given["video"].float(), given["reconstruction"], backend=backend)
    assert golden.close("router", "score", scores, want["score"], 1e-6).passed
    rules = {key.split("/")[0] for key in want if "/" in key}
    assert len(rules) == 13
    for rule in rules:
        name, rate = rule.rsplit("_r", 1)
        strategy = {
            "forward": "elbo",
            "elbo": "elbo",
            "global_elbo": "global_elbo",
            "global_elbo_bin": "bin",
        }[name]
        budget = token_budget(
            scores, float(rate), strategy=strategy, elbo_mean=given["elbo_mean"], released=True
        )
        assert budget.tolist() == want[f"{rule}/kept"].tolist(), rule
        for method in ("threshold", "topk"):  # no ties here, so both keep the same
            assert torch.equal(
                select_tokens(scores, budget, method=method, backend=backend), want[f"{rule}/mask"]
            ), rule


def test_orders_of_the_official_code():
    data = golden.Golden.load(GOLDEN)
    want, rates = data.under("out/order_masks"), data.tensors["in/order_masks/rates"]
    kept = (rates * 16).floor().long().add(1).clamp_max(16)  # it keeps index <= rate N, one more than N rate
    for method, name in (("order", "order"), ("order_strided", "order_4")):
        mask = select_tokens(torch.zeros(2, 3, 4, 4), kept, method=method).flatten(2)
        assert torch.equal(mask.unsqueeze(1).expand(-1, 2, -1, -1), want[name])


# ---- errors ------------------------------------------------------------------------------------------------

VIDEO = torch.zeros(1, 3, 5, 8, 8)


@pytest.mark.parametrize(
    "error, message, call",
    [
        (TypeError, "video: .*int64", lambda: router_scores(VIDEO.long(), VIDEO.long())),
        (TypeError, "reconstruction: .*float16", lambda: router_scores(VIDEO, VIDEO.half())),
        (ValueError, r"video: .*\(3, 5, 8, 8\)", lambda: router_scores(VIDEO[0], VIDEO[0])),
        (ValueError, r"reconstruction: .*\(1, 3, 5, 8, 4\)", lambda: router_scores(VIDEO, VIDEO[..., :4])),
        (
            ValueError,
            r"grid: .*frames after the first are 3",
            lambda: router_scores(VIDEO[:, :, :4], VIDEO[:, :, :4]),
        ),
        (ValueError, r"grid: .*columns are 8", lambda: router_scores(VIDEO, VIDEO, (4, 8, 3))),
        (ValueError, r"grid: .*\(4, 8\)", lambda: router_scores(VIDEO, VIDEO, (4, 8))),
        (ValueError, "strategy: .*'best'", lambda: token_budget(torch.zeros(1, 4), 0.5, strategy="best")),
        (ValueError, "rate: .*1.5", lambda: token_budget(torch.zeros(1, 4), 1.5)),
        (ValueError, "rate: .*nan", lambda: token_budget(torch.zeros(1, 4), math.nan)),
        (ValueError, "elbo_mean: .*None", lambda: token_budget(torch.zeros(1, 4), 0.5, strategy="bin")),
        (
            ValueError,
            "elbo_mean: .*0.0",
            lambda: token_budget(torch.zeros(1, 4), 0.5, strategy="global_elbo", elbo_mean=0.0),
        ),
        (
            TypeError,
            "elbo_mean: .*0.5",
            lambda: token_budget(torch.zeros(1, 4), 0.5, strategy="elbo_ema", elbo_mean=0.5),
        ),
        (
            ValueError,
            "decay: .*2.0",
            lambda: token_budget(
                torch.zeros(1, 4), 0.5, strategy="elbo_ema", elbo_mean=torch.ones(1), decay=2.0
            ),
        ),
        (ValueError, "method: .*'random'", lambda: select_tokens(torch.zeros(1, 4), 2, method="random")),
        (ValueError, "budget: .*0 to 4.*got 5", lambda: select_tokens(torch.zeros(1, 4), 5)),
        (
            ValueError,
            "budget: .*0 to 4.*got -1",
            lambda: select_tokens(torch.zeros(1, 4), torch.tensor([-1])),
        ),
        (
            ValueError,
            "budget: .*0 to 4.*got 7",
            lambda: select_tokens(torch.zeros(1, 3, 4), [7], method="order"),
        ),
        (ValueError, r"budget: .*\(3,\)", lambda: select_tokens(torch.zeros(1, 4), [1, 2, 3])),
        (TypeError, "budget: .*float32", lambda: select_tokens(torch.zeros(1, 4), 1.5)),
        (TypeError, "scores: .*int64", lambda: select_tokens(torch.zeros(1, 4).long(), 1)),
        (
            ValueError,
            "stride: .*0",
            lambda: select_tokens(torch.zeros(1, 3, 4), 1, method="order_strided", stride=0),
        ),
        (
            ValueError,
            r"keep: .*\(1, 5\)",
            lambda: pack_tokens(torch.zeros(1, 3, 4), torch.ones(1, 5, dtype=torch.bool)),
        ),
        (
            ValueError,
            "capacity: 4 tokens are kept, got 3",
            lambda: pack_tokens(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), capacity=3),
        ),
        (
            ValueError,
            "capacity: .*-1",
            lambda: pack_tokens(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), capacity=-1),
        ),
        (
            ValueError,
            r"levels: .*\(1, 4\)",
            lambda: pack_tokens(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool), levels=[8]),
        ),
        (
            ValueError,
            "keep: expected 2 masks",
            lambda: pack_tokens([torch.zeros(1, 4)] * 2, [torch.ones(1, 4, dtype=torch.bool)]),
        ),
        (
            TypeError,
            "keep: expected a tensor, as tokens is one, got list",
            lambda: pack_tokens(torch.zeros(1, 4), [True] * 4),
        ),
        (
            vtok_fast.BackendError,
            "backend='sm90' does not exist",
            lambda: select_tokens(torch.zeros(1, 4), 1, backend="sm90"),
        ),
    ],
)
def test_bad_arguments_are_named(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_a_mask_that_does_not_fit_the_values_is_named(backend):
    packed = pack_tokens(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool))
    short = PackedTokens(packed.values[:3], packed.indices[:3], packed.cu_seqlens, packed.mask)
    with pytest.raises(ValueError, match="packed.mask: keeps 4 positions, of 3 values"):
        unpack_tokens(short, backend=backend)
    with pytest.raises(ValueError, match=r"shape: expected \(1, 4\), got \(1, 5\)"):
        unpack_tokens(packed, shape=(1, 5))
    with pytest.raises(ValueError, match="fill: .*0.5"):
        unpack_tokens(packed.with_values(packed.values.int()), fill=0.5)


def test_everything_works_where_triton_does_not():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, vtok_fast; x = torch.randn(1, 3, 5, 8, 8); "
        "s = vtok_fast.router_scores(x, -x); k = vtok_fast.select_tokens(s, 1); vtok_fast.norm_act(x); "
        "p = vtok_fast.pack_tokens(s, k); assert vtok_fast.unpack_tokens(p).shape == s.shape; "
        "assert 'Triton cannot be imported' in vtok_fast.available_backends()['norm_act']['triton']"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_late_errors_are_raised_once():
    """What a GPU reports late, here with the flag of the CPU."""
    from vtok_fast.ops.token_packing.packed_tokens import BUDGET, CAPACITY, note_error, raise_device_errors

    device = torch.device("cpu")
    raise_device_errors(device)
    note_error(torch.tensor([False, True]), BUDGET)
    note_error(torch.tensor(False), CAPACITY)
    with pytest.raises(ValueError, match="^budget: [^;]*$"):
        raise_device_errors(device)
    raise_device_errors(device)


@pytest.mark.needs_native
def test_kernels_clamp_what_nobody_checked():
    call = token_selection.SelectCall(torch.rand(3, 10), torch.tensor([-5, 4, 99]), "topk", 4)
    keep = token_selection._run_cpu(call)
    assert keep.sum(1).tolist() == [0, 4, 10]
    assert reference.select_tokens(*call[:2]).sum(1).tolist() == [0, 4, 10]


@pytest.mark.slow
@pytest.mark.needs_native
def test_more_than_2_to_31_elements():
    keep = torch.zeros(1, 17, 1024, 512, dtype=torch.bool)
    keep[0, -1, -1, -5:] = keep[0, 0, 0, 0] = True
    z = torch.zeros(1, 17, 1024, 512, 256, dtype=torch.uint8).movedim(-1, 1)  # 2.28e9 elements
    z[0, :, -1, -1, -5:] = 7
    packed = pack_tokens(z, keep, backend="cpu")
    assert packed.indices.tolist() == [0, *range(17 * 1024 * 512 - 5, 17 * 1024 * 512)]
    assert packed.values[1:].eq(7).all() and not packed.values[0].any()
    dense = unpack_tokens(packed, backend="cpu")
    assert dense[0, :, -1, -1, -5:].eq(7).all() and int(dense.sum(dtype=torch.int64)) == 7 * 5 * 256
