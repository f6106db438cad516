"""fsq: the definition by thresholds, agreement of all backends bit for bit, the published mismatch against
float32, golden data."""

import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vtok_fast
from vtok_fast.dispatch import native
from vtok_fast.nn.fsq import FSQ
from vtok_fast.ops.fsq import fsq_decode, fsq_entropy_loss, fsq_quantize
from vtok_fast.reference import fsq as reference

LEVEL_SETS = ([8] * 5, [8, 8, 8, 5, 5, 5], [4, 3, 2], [64], [26, 1000], [2] * 31)
NARROW = (torch.float32, torch.bfloat16, torch.float16)


def float64_index(z: float, level: int, variant: str) -> tuple[int, float]:
    """The defining formula, written out, and how far the bounded value is from the nearest rounding
    boundary."""
    offset = 0.5 if level % 2 == 0 else 0.0
    half = (level - 1) * (1.001 if variant == "vidtok" else 0.999) / 2
    shift = math.atanh(offset / half) if variant == "vidtok" else math.tan(offset / half)
    bounded = math.tanh(z + shift) * half - offset
    return round(bounded) + level // 2, abs(bounded - math.floor(bounded) - 0.5)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_thresholds_are_where_the_float64_formula_steps(variant):
    for level in (*range(2, 65), 255, 1000):
        values = reference.thresholds(level, variant)
        below = torch.nextafter(values, torch.tensor(-math.inf))
        assert len(values) == level - 1 and torch.all(values[1:] > values[:-1])
        for k in range(level - 1):
            (at, margin), (before, margin_before) = (
                float64_index(v[k].item(), level, variant) for v in (values, below)
            )
            assert (before, at) == (k, k + 1)
            # More than any two libraries' tanh differ by (a few roundings near 1, times half_l): thresholds
            # are the same anywhere.
            assert min(margin, margin_before) > 8 * 2**-53 * level


@pytest.mark.needs_native
@pytest.mark.parametrize("dtype", NARROW)
def test_kernel_equals_reference_next_to_thresholds(isa, dtype):
    for variant in reference.VARIANTS:
        for levels in (*([n] for n in (*range(2, 18), 25, 26, 33, 63, 64)), [8, 5, 64], [8] * 6):
            t = torch.cat([reference.thresholds(n, variant) for n in sorted(set(levels))])
            up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
            z = torch.cat(
                [
                    t,
                    torch.nextafter(t, up),
                    torch.nextafter(t, down),
                    t.to(dtype).float(),
                    torch.tensor([0.0, -0.0, math.inf, -math.inf]),
                ]
            )
            z = z.to(dtype).repeat(len(levels) * 3)
            z = z[: len(z) // len(levels) * len(levels)].view(-1, len(levels))
            for value, dim in ((z, 1), (z.T.contiguous(), 0)):
                got = fsq_quantize(value, levels, variant=variant, dim=dim, backend="cpu")
                want = fsq_quantize(value, levels, variant=variant, dim=dim, backend="reference")
                assert torch.equal(got.indices, want.indices) and torch.equal(got.codes, want.codes)
        indices = fsq_quantize(z, levels, variant=variant, backend="cpu").indices
        written_out = [
            sum(float64_index(v, n, variant)[0] * 8**i for i, (v, n) in enumerate(zip(row, levels)))
            for row in z[:99].tolist()
        ]
        assert indices[:99].tolist() == written_out


@pytest.mark.needs_native
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=str)
def test_every_layout_and_a_nan(isa, levels):
    for dtype in NARROW:
        z = torch.randn(2, len(levels), 3, 5, 21).to(dtype)
        z.view(-1)[5], z.view(-1)[9], z.view(-1)[11] = math.nan, math.inf, -math.inf
        last = torch.channels_last_3d
        for value, dim in (
            (z, 1),
            (z.contiguous(memory_format=last), 1),
            (z.movedim(1, -1), 4),
            (z.movedim(1, -1).contiguous(), -1),
            (z[..., ::2], 1),
            (z.contiguous(memory_format=last)[:, :, :, 1:], 1),
            (z.transpose(2, 4), 1),
            (z[:, :, 0, 0, 0], 1),
            (z.expand(2, 2, *z.shape[1:]), 2),
        ):
            got = fsq_quantize(value, levels, dim=dim, backend="cpu")
            want = fsq_quantize(value, levels, dim=dim, backend="reference")
            assert same(got.codes, want.codes) and torch.equal(got.indices, want.indices)
            assert got.codes.stride() == want.codes.stride() and got.indices.is_contiguous()
            nan = value.isnan()
            assert torch.equal(got.codes.isnan(), nan) and torch.equal(got.indices == -1, nan.any(dim))


@pytest.mark.needs_native
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_shape(data):
    levels = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=9))
    shape = data.draw(st.lists(st.integers(0, 70), max_size=3))
    dim = data.draw(st.integers(0, len(shape)))
    z = torch.randn(*shape[:dim], len(levels), *shape[dim:])
    got = fsq_quantize(z, levels, dim=dim, backend="cpu")
    want = fsq_quantize(z, levels, dim=dim, backend="reference")
    assert torch.equal(got.indices, want.indices) and torch.equal(got.codes, want.codes)
    assert torch.equal(fsq_decode(got.indices, levels, dim=dim), got.codes)


@pytest.mark.needs_native
def test_every_element_is_written_and_none_beside(isa):
    levels = [8, 5, 6]
    for channels_innermost in (False, True):
        z = torch.randn(3, 103).T.contiguous().T if channels_innermost else torch.randn(3, 103)
        codes, indices = torch.full((3 * 103 + 64,), math.nan), torch.full((103 + 64,), -7, dtype=torch.int32)
        inside, between = codes[32:-32].as_strided(z.shape, z.stride()), indices[32:-32]
        table = vtok_fast.ops.fsq.threshold_table(tuple(levels), "vidtok")
        native.lib().fsq_quantize(
            native.arg(z), native.arg(inside), native.arg(between), native.arg(table), levels, 0, 2
        )
        assert inside.isfinite().all() and codes[:32].isnan().all() and codes[-32:].isnan().all()
        assert (between >= 0).all() and (indices[:32] == -7).all() and (indices[-32:] == -7).all()


@pytest.mark.parametrize("size", ((17, 256, 256), (3, 601, 601)), ids=str)
@pytest.mark.parametrize(
    "layout", (torch.contiguous_format, torch.channels_last_3d), ids=("planar", "channels last")
)
def test_results_larger_than_the_caches(isa, layout, size):
    """Codes above 16 MiB are written past the caches, where the addresses allow it; odd sizes put them off
    the vectors' grid."""
    z = (torch.randn(1, 4, *size) * 1.5).contiguous(memory_format=layout)
    z[0, 2, 1, 77, 5] = math.nan
    codes, indices = fsq_quantize(z, [8, 5, 8, 3])
    want_codes, want_indices = fsq_quantize(z, [8, 5, 8, 3], backend="reference")
    assert z.numel() * 4 > 16 << 20 and same(codes, want_codes) and torch.equal(indices, want_indices)
    assert indices[0, 1, 77, 5] == -1


@pytest.mark.parametrize("dtype", (*NARROW, torch.float64))
def test_all_codes_of_a_codebook_are_fixed_points(dtype):
    levels = [8] * 5
    every = torch.arange(8**5, dtype=torch.int32)
    codes = fsq_decode(every, levels, dtype=dtype)
    assert codes.dtype == dtype and codes.unique(dim=0).shape == (8**5, 5)
    # A code is not where its own level is: tanh compresses. Its level's center is.
    half_l, offset, shift = reference.bound_constants(8)
    centers = torch.tensor([math.atanh((k - 4 + offset) / half_l) - shift for k in range(8)], dtype=dtype)
    z = centers[((codes.float() * 4) + 4).long()]
    again = fsq_quantize(z, levels)
    assert torch.equal(again.indices, every) and torch.equal(again.codes, codes)


def test_indices_outside_the_codebook_decode_to_nan():
    codes = fsq_decode(torch.tensor([[-1, 0, 23, 24, 2**31 - 1]]), [4, 3, 2], dim=-1)
    assert codes.isnan().all(-1).tolist() == [[True, False, False, True, True]]


def test_largest_codebook_fills_int32():
    levels = [2] * 31
    z = torch.full((1, 31), 9.0)
    assert fsq_quantize(z, levels).indices.item() == 2**31 - 1
    assert torch.equal(fsq_decode(torch.tensor([2**31 - 1]), levels), fsq_quantize(z, levels).codes)


def test_mismatch_against_the_float32_formula():
    """Published: below 1e-5 of random normals, all within a few float32 steps of a threshold."""
    z = torch.randn(1_000_000, 6, generator=torch.Generator().manual_seed(0))
    for levels in ([8] * 6, [8, 8, 8, 5, 5, 5]):
        ours, official = fsq_quantize(z, levels).indices, reference.official_float32(z, levels)[1]
        wrong = torch.nonzero(ours != official).flatten()
        assert len(wrong) <= 1e-5 * len(z)
        for row in wrong:
            steps = [
                (z[row, c] - reference.thresholds(n)).abs().min() / torch.finfo(torch.float32).eps
                for c, n in enumerate(levels)
            ]
            assert min(steps) <= 8  # of the bounded value's own size, which is up to 4 of those of z


@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_gradient_is_that_of_the_bound(variant):
    levels = [8, 5, 2]
    z = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def bound(z):
        channels = []
        for c, level in enumerate(levels):
            half_l, offset, shift = reference.bound_constants(level, variant)
            channels.append((torch.tanh(z[:, c] + shift) * half_l - offset) / (level // 2))
        return torch.stack(channels, 1)

    upstream = torch.randn_like(z)
    (expected,) = torch.autograd.grad(bound(z), z, upstream)
    (got,) = torch.autograd.grad(fsq_quantize(z, levels, variant=variant).codes, z, upstream)
    torch.testing.assert_close(got, expected)
    assert torch.autograd.gradcheck(bound, z)
    z32 = z.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(fsq_quantize(z32, levels, variant=variant).codes, z32, upstream.float())
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-5)


def dense_loss(z, levels, gamma=1.0, clamp_tokens=0.0, inv_temperature=100.0):
    """The same terms from the (tokens, codebook) table; also with a token's probabilities clamped, as VidTok
    does."""
    codebook = fsq_decode(torch.arange(math.prod(levels)), levels, dtype=torch.float64)
    flat = z.movedim(1, -1).flatten(0, -2).double()
    log_p = torch.log_softmax(2 * inv_temperature * flat @ codebook.T, -1)
    p = log_p.exp()
    tokens = -(p * (log_p if not clamp_tokens else p.clamp_min(clamp_tokens).log())).sum(-1).mean()
    mean = p.mean(0)
    return tokens + gamma * (mean * mean.clamp_min(1e-5).log()).sum()


@pytest.mark.parametrize("levels", ([8, 5], [4, 3, 2], [8, 8, 8], [7]), ids=str)
def test_entropy_loss_is_the_dense_formula(levels):
    z = torch.randn(2, len(levels), 2, 3, 4, dtype=torch.float64, requires_grad=True)
    for gamma, temperature in ((1.0, 100.0), (0.5, 3.0)):
        entropy, commitment = fsq_entropy_loss(z, levels, gamma=gamma, inv_temperature=temperature)
        dense = dense_loss(z, levels, gamma, inv_temperature=temperature)
        torch.testing.assert_close(entropy, dense, rtol=1e-11, atol=1e-12)
        for got, want in zip(torch.autograd.grad(entropy, z), torch.autograd.grad(dense, z)):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(commitment, (z - fsq_quantize(z.detach(), levels).codes).square().mean())


# ---- golden data: what VidTok's own code computed ----------------------------------------------------------


def golden():
    from safetensors import safe_open

    here = Path(__file__).resolve().parents[1]
    folders = [
        here / "golden_data",
        os.environ.get("VTOK_FAST_GOLDEN", ""),
        here.parent.parent / "shared" / "golden",
    ]
    for folder in folders:
        path = Path(folder) / "vidtok_fsq_regularizer.safetensors"
        if str(folder) and path.is_file():
            return safe_open(str(path), "pt")
    return None


GOLDEN = golden()
CASES = sorted({k.split("/")[1] for k in GOLDEN.keys() if k.startswith("in/L")}) if GOLDEN else []  # noqa: SIM118
needs_golden = pytest.mark.skipif(
    GOLDEN is None, reason="no vidtok_fsq_regularizer.safetensors: set VTOK_FAST_GOLDEN"
)


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_golden_indices_codes_gradients(case):
    get, levels = GOLDEN.get_tensor, [int(n) for n in case[1:].split("-")]
    codes, indices = fsq_quantize(get(f"in/{case}/z"), levels)
    assert torch.equal(indices, get(f"out/{case}/indices_rounded")) and torch.equal(
        codes, get(f"out/{case}/codes")
    )
    near = fsq_quantize(get(f"in/{case}/z_near_threshold"), levels, dim=-1)
    assert torch.equal(near.indices, get(f"out/{case}/near_threshold_indices_rounded"))
    assert torch.equal(near.codes, get(f"out/{case}/near_threshold_codes"))
    z = get(f"in/{case}/train_a/z").double().requires_grad_()
    (grad,) = torch.autograd.grad(
        fsq_quantize(z, levels).codes, z, get(f"in/{case}/train_a/upstream_grad").double()
    )
    # Its half_l and shift are rounded to float32: relative errors eps and, through atanh(x), eps x / (1 -
    # x^2), and the slope 1 - tanh^2 at most doubles that of the shift.
    x = max(offset / half_l for half_l, offset, _ in map(reference.bound_constants, levels))
    rtol = 2 * 2 * torch.finfo(torch.float32).eps * (1 + x / (1 - x * x))
    torch.testing.assert_close(grad, get(f"out/{case}/train_a/grad_z_of_codes_f64"), rtol=rtol, atol=1e-12)


@needs_golden
@pytest.mark.parametrize("case", [c for c in CASES if math.prod(int(n) for n in c[1:].split("-")) <= 4096])
def test_golden_losses(case):
    levels = [int(n) for n in case[1:].split("-")]
    for part in ("train_a", "train_b"):
        z = GOLDEN.get_tensor(f"in/{case}/{part}/z").double()
        entropy, commitment = fsq_entropy_loss(z, levels)
        # VidTok clamps a token's probabilities too: what that changes is computed densely here.
        clamp = dense_loss(z, levels, clamp_tokens=1e-5) - dense_loss(z, levels)
        assert clamp <= 0
        torch.testing.assert_close(
            (entropy + clamp).view(1),
            GOLDEN.get_tensor(f"out/{case}/{part}/entropy_only/aux_loss_f64"),
            rtol=2e-6,
            atol=2e-6,
        )
        torch.testing.assert_close(
            commitment.view(1),
            GOLDEN.get_tensor(f"out/{case}/{part}/commit_only/aux_loss_f64"),
            rtol=2e-6,
            atol=2e-6,
        )


# ---- torch -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last_3d))
def test_opcheck(layout):
    z = torch.randn(2, 3, 2, 4, 5).contiguous(memory_format=layout)
    for dtype, backend in ((torch.float32, None), (torch.bfloat16, "reference")):
        torch.library.opcheck(
            torch.ops.vtok_fast.fsq_quantize, (z.to(dtype).requires_grad_(), [8, 5, 4], "vidtok", 1, backend)
        )


def test_compile_fullgraph():
    module, z = FSQ([8, 5, 4]), torch.randn(2, 3, 2, 4, 5)
    compiled = torch.compile(
        lambda v: (*module(v), module.decode(module(v).indices)), fullgraph=True, backend="aot_eager"
    )
    for got, want in zip(compiled(z), (*module(z), module.decode(module(z).indices))):
        assert torch.equal(got, want) and got.stride() == want.stride()


def test_module():
    module = FSQ((8, 8, 8, 5, 5, 5), variant="elastictok", dim=-1)
    z = torch.randn(7, 6)
    assert module.codebook_size == 64000 and not module.state_dict()
    assert torch.equal(module.decode(module(z).indices), module(z).codes)
    assert torch.equal(
        module(z).indices,
        fsq_quantize(z, module.levels, variant="elastictok", dim=-1, backend="reference").indices,
    )


@pytest.mark.parametrize(
    "levels, options, message",
    [
        ([8, 1], {}, r"levels: .*\(8, 1\)"),
        ([], {}, r"levels: .*\(\)"),
        ([8, 1001], {}, "levels: .*1001"),
        ([1000] * 4, {}, r"levels: a codebook of at most 2\*\*31.*1000000000000"),
        ([8, 8], {}, r"levels: .* 3 channels .*\(8, 8\)"),
        ([8] * 3, {"variant": "lfq"}, "variant: .*'lfq'"),
        ([8] * 3, {"dim": 5}, "dim: .*5"),
        ([8] * 3, {"backend": "gpu"}, "backend: .*'gpu'"),
        ([8, 8.5, 8], {}, r"levels: .*8\.5"),
    ],
)
def test_bad_arguments_are_named(levels, options, message):
    with pytest.raises(ValueError, match=message):
        fsq_quantize(torch.randn(1, 3, 2, 2, 2), levels, **options)


def test_bad_types_are_named():
    with pytest.raises(TypeError, match="z: .*int64"):
        fsq_quantize(torch.ones(1, 3, dtype=torch.int64), [8] * 3)
    with pytest.raises(TypeError, match="indices: .*float32"):
        fsq_decode(torch.ones(3), [8])
    with pytest.raises(TypeError, match="dtype: .*int32"):
        fsq_decode(torch.ones(3, dtype=torch.int32), [8], dtype=torch.int32)
    with pytest.raises(ValueError, match="dim: .*4"):
        fsq_decode(torch.ones(3, dtype=torch.int32), [8], dim=4)
    with pytest.raises(vtok_fast.BackendError, match="float64"):
        fsq_quantize(torch.ones(1, 3, dtype=torch.float64), [8] * 3, backend="cpu")
