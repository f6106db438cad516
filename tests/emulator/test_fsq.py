"""The CUDA kernels of fsq in the emulator: the reference's bits, in every layout, next to every threshold."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from support import emulator

from vtok_fast.ops.fsq import call as calls
from vtok_fast.ops.fsq import (
    gradient,
    op,
    sm80,
    threshold_table,
)
from vtok_fast.reference import fsq as reference

pytestmark = pytest.mark.needs_emulator
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def fsq():
    names = {"quantize": "fsq_quantize", "decode": "fsq_decode", "backward": "fsq_backward"}
    return emulator.build(
        "csrc/cuda/fsq/fsq.cu",
        "csrc/cuda/fsq/fsq_backward.cu",
        includes=["cuda/fsq/fsq.h"],
        exports={name: f"vtok::cuda::{function}" for name, function in names.items()},
    )


@pytest.fixture(autouse=True)
def fresh_numbers():
    torch.manual_seed(0)


def same(a, b):
    return (
        a.dtype == b.dtype
        and torch.equal(a.isnan(), b.isnan())
        and torch.equal(a.nan_to_num(0.0), b.nan_to_num(0.0))
    )


def poisoned(like):
    return torch.full_like(like, math.nan)


def check(fsq, z, levels, variant="vidtok", dim=1, seed=0):
    dim %= z.dim()
    codes = poisoned(z)
    indices = torch.full([n for i, n in enumerate(z.shape) if i != dim], -7, dtype=torch.int32)
    fsq.quantize(z, codes, indices, threshold_table(tuple(levels), variant), levels, dim, None, seed=seed)
    want_codes, want_indices = reference.fsq_quantize(z, levels, variant=variant, dim=dim)
    assert torch.equal(indices, want_indices) and same(codes, want_codes)
    return codes, indices


def layouts(z):
    """(B, C, T, H, W) in the ways that programs have it, with the channel dimension of each."""
    last, channels = z.contiguous(memory_format=torch.channels_last_3d), z.shape[1]
    return {
        "planar": (z, 1),
        "channels last": (last, 1),
        "channels last in rank": (z.movedim(1, -1).contiguous(), -1),
        "rows of a longer frame": (last[:, :, :, 1:], 1),
        "positions first": (z.flatten(2)[0].T.contiguous(), 1),
        "half of the channels' storage": (torch.cat([z, z], 1)[:, :channels], 1),
        "every second of it": (torch.stack([z, z], 2).flatten(1, 2)[:, ::2], 1),
        "strided": (z[..., ::2], 1),
        "off 16 bytes": (z[..., 1:], 1),
        "transposed": (z.transpose(2, 4), 1),
        "one position": (z[:1, :, 0, 0, 0], 1),
        "expanded": (z.expand(2, 2, *z.shape[1:]), 2),
    }


def test_layouts_reach_the_kernel_made_for_them(fsq):
    want = {
        "planar": "planar",
        "channels last": "rows",
        "channels last in rank": "rows",
        "rows of a longer frame": "rows",
        "positions first": "rows",
        "half of the channels' storage": "planar",
        "every second of it": "planar",
        "expanded": "planar",
    }
    for name, (z, dim) in layouts(torch.randn(2, 4, 3, 32, 24)).items():
        check(fsq, z, [8] * 4, dim=dim)
        assert f"quantize_{want.get(name, 'any')}<" in fsq.launched, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", reference.VARIANTS)
def test_next_to_every_threshold(fsq, variant, dtype):
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    for levels in (
        *([n] for n in range(2, 65)),
        [8, 5, 64],
        [8] * 6,
        [8, 8, 8, 5, 5, 5],
        [2, 64, 33, 17, 9],
        [26, 500],
    ):
        t = torch.cat([reference.thresholds(n, variant) for n in sorted(set(levels))])
        near = torch.cat(
            [
                t.to(dtype),
                torch.nextafter(t.to(dtype), up.to(dtype)),
                torch.nextafter(t.to(dtype), down.to(dtype)),
                torch.nextafter(t, up).to(dtype),
                torch.nextafter(t, down).to(dtype),
                torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan]).to(dtype),
            ]
        )
        z = torch.stack([near.roll(3 * c) for c in range(len(levels))], 1)  # every channel sees every value
        check(fsq, z, levels, variant)
        check(fsq, z.T.contiguous(), levels, variant, 0)


@pytest.mark.parametrize(
    "levels", ([8] * 4, [8] * 5, [8, 8, 8, 5, 5, 5], [4, 3, 2], [64, 26], [300], [2] * 31), ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(fsq, dtype, levels):
    z = torch.randn(2, len(levels), 3, 8, 24).mul(1.5).to(dtype)
    z.view(-1)[5], z.view(-1)[9], z.view(-1)[11] = math.nan, math.inf, -math.inf
    for seed, (value, dim) in zip(itertools.cycle(SEEDS), layouts(z).values()):
        check(fsq, value, levels, dim=dim, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("last", (False, True), ids=("planar", "channels last"))
def test_orders_and_sizes(fsq, last, seed):
    for positions in (1, 3, 8, 255, 256, 257, 511, 2048, 2049):
        for dtype in DTYPES:
            z = torch.randn(2, positions, 5).to(dtype)
            check(fsq, z if last else z.mT.contiguous(), [8] * 5, dim=2 if last else 1, seed=seed)


def test_offsets_beyond_32_bits(fsq):
    """Two batches 2**31 + 64 elements apart; the memory between them is never touched."""
    apart = 2**31 + 64
    for dim, sizes, strides in ((1, (2, 5, 64), (apart, 64, 1)), (2, (2, 64, 5), (apart, 5, 1))):
        z, codes = (
            torch.empty(apart + 5 * 64, dtype=torch.bfloat16).as_strided(sizes, strides) for _ in range(2)
        )
        z.copy_(torch.randn(sizes))
        codes.fill_(math.nan)
        indices = torch.full((2, 64), -7, dtype=torch.int32)
        fsq.quantize(z, codes, indices, threshold_table((8,) * 5, "vidtok"), [8] * 5, dim, None)
        want_codes, want_indices = reference.fsq_quantize(z, [8] * 5, dim=dim)
        assert torch.equal(indices, want_indices) and torch.equal(codes, want_codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", ([8] * 4, [5, 1000, 7], [2] * 31), ids=str)
def test_decode(fsq, levels, dtype):
    codebook = math.prod(levels)
    indices = torch.randint(0, codebook, (2, 3, 100), dtype=torch.int64)
    indices[0, 0, :4] = torch.tensor([-1, codebook, 0, codebook - 1])
    for index in (
        indices,
        indices.clamp_max(2**31 - 1).int(),
        indices.transpose(0, 2),
        indices[..., ::3].int(),
    ):
        for dim, seed in ((1, 0), (3, 1), (0, 2)):
            want = reference.fsq_decode(index, levels, dtype=dtype, dim=dim)
            for codes in (
                torch.empty_strided(want.shape, want.stride(), dtype=dtype),
                torch.empty(want.shape, dtype=dtype),
            ):
                codes.fill_(math.nan)
                fsq.decode(index, codes, levels, dim, None, seed=seed)
                assert same(codes, want)


def test_codes_are_rounded_quotients(fsq):
    """(level - half) / half by a product and a Newton step, for every number of levels."""
    for level in range(2, 1001):
        indices, codes = torch.arange(level, dtype=torch.int32), torch.full((level, 1), math.nan)
        fsq.decode(indices, codes, [level], 1, None)
        assert torch.equal(codes, reference.fsq_decode(indices, [level], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("levels", ([8] * 5, [5], [2] * 31), ids=str)
def test_backward(fsq, levels, dtype):
    z = torch.randn(2, len(levels), 3, 8, 24).to(dtype)
    half_l, _, shift = zip(*map(reference.bound_constants, levels))
    slopes = [h / (level // 2) for h, level in zip(half_l, levels)]
    for seed, (value, dim) in zip(itertools.cycle(SEEDS), layouts(z).values()):
        dim %= value.dim()
        for grad in (
            torch.randn_like(value),
            torch.randn(value.shape[::-1]).to(dtype).permute(*reversed(range(value.dim()))),
        ):
            got = torch.empty_like(value).fill_(math.nan)
            fsq.backward(grad, value, got, list(shift), slopes, dim, None, seed=seed)
            want = reference.fsq_quantize_backward(grad.double(), value.double(), levels, dim=dim)
            # The sum z + shift and the slope lose an eps each relative to sizes up to 8, tanh two more, 1 - t
            # * t is at most 1.
            error = (got.double() - want).abs()
            eps, of = torch.finfo(torch.float32).eps, torch.finfo(dtype)
            bound = grad.double().abs() * 16 * eps + want.abs() * of.eps + of.smallest_normal * of.eps
            assert torch.all(error <= bound)


def strides(tensor):
    """Of the dimensions that have more than one element: those of the others mean nothing."""
    return [step for step, size in zip(tensor.stride(), tensor.shape) if size > 1]


def test_the_op_on_these_kernels(fsq):
    """What vtok_fast.ops.fsq does on a GPU, with the emulator in place of the native module."""
    lib = SimpleNamespace(
        fsq_sm80_quantize=fsq.quantize, fsq_sm80_decode=fsq.decode, fsq_sm80_backward=fsq.backward
    )
    for levels, dtype in (
        ([8] * 5, torch.float32),
        ([8, 8, 8, 5, 5, 5], torch.bfloat16),
        ([40], torch.float16),
    ):
        z = torch.randn(2, len(levels), 3, 8, 24).mul(1.5).to(dtype)
        for value, dim in layouts(z).values():
            call = calls.FSQCall(value, tuple(levels), "vidtok", dim % value.dim())
            for got, want in zip(sm80.run(call, lib), op.run_reference(call)):
                assert same(got, want) and strides(got) == strides(want)
            decode = calls.FSQDecodeCall(want, *call[1:2], dtype, call.dim)
            got, want = sm80.decode(decode, lib), op.decode_reference(decode)
            assert same(got, want) and strides(got) == strides(want)
            backward = calls.FSQBackwardCall(torch.randn_like(value), *call)
            got, want = sm80.backward(backward, lib), gradient.run_reference(backward)
            torch.testing.assert_close(
                got, want, rtol=2 * torch.finfo(dtype).eps, atol=32 * torch.finfo(torch.float32).eps
            )
            assert got.stride() == torch.empty_like(value).stride()


def test_what_the_kernels_refuse(fsq):
    z = torch.randn(4, 1)
    table = threshold_table((1000,), "vidtok")
    with pytest.raises(NotImplementedError, match="more than 768 thresholds"):
        fsq.quantize(z, z.clone(), torch.empty(4, dtype=torch.int32), table, [1000], 1, None)
    with pytest.raises(ValueError, match="indices: expected int32"):
        fsq.quantize(z, z.clone(), torch.empty(3, dtype=torch.int32), table, [1000], 1, None)
    with pytest.raises(ValueError, match="codes: expected"):
        fsq.quantize(z, z.half(), torch.empty(4, dtype=torch.int32), table, [1000], 1, None)
    with pytest.raises(NotImplementedError, match="32 channels, at most 31"):
        fsq.decode(torch.zeros(4, dtype=torch.int32), torch.empty(4, 32), [2] * 32, 1, None)
