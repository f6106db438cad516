"""The Triton kernels of token_packing against the reference, bit for bit, under the interpreter (see
tests/support/triton_harness.py)."""

import math

import pytest
import torch

from vtok_fast.kernels import token_packing as kernels
from vtok_fast.ops.fsq import fsq_quantize, threshold_table
from vtok_fast.reference import token_packing as reference

DTYPES = (torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow))


def flag():
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ("planar", "channels_last", "transposed"))
def test_scores(dtype, layout):
    for shape, grid in (
        ((2, 3, 5, 16, 24), (4, 8, 8)),
        ((1, 2, 3, 6, 10), (2, 3, 5)),
        ((1, 1, 1, 20, 300), (4, 10, 150)),
        ((0, 3, 5, 8, 8), (4, 8, 8)),
    ):
        a, b = torch.randn(shape).to(dtype), (torch.randn(shape) * 10 ** torch.randn(shape) * 5).to(dtype)
        if shape[0]:
            a[0, 0, 0, 1, 2], b[-1, -1, -1, -1, -1] = math.nan, math.inf
        if layout == "channels_last":
            a, b = (v.contiguous(memory_format=torch.channels_last_3d) for v in (a, b))
        elif layout == "transposed":
            a = a.transpose(3, 4).contiguous().transpose(3, 4)
        got, want = kernels.router_scores(a, b, grid), reference.router_scores(a, b, grid)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(
            got.nan_to_num(-1.0), want.nan_to_num(-1.0)
        )


@pytest.mark.parametrize("released", (False, True))
@pytest.mark.parametrize("strategy", reference.STRATEGIES)
def test_budgets(strategy, released):
    scores = torch.rand(5, 3000) * torch.logspace(-2, 2, 5).unsqueeze(1)
    scores[3, 5], scores[1, 7], scores[4, 1] = math.nan, -9000.0, math.inf
    for rate in (torch.tensor([0.37]), torch.tensor([0.0, 0.3, 0.5, 1.0, 7.0])):
        rate, mean = rate.double(), torch.tensor(0.8)
        want = reference.counts(reference.rates(scores, rate, strategy, mean), 3000, released)
        assert torch.equal(kernels.token_budget(scores, rate, strategy, mean, released), want)


def test_budgets_count_like_the_reference_at_every_half():
    rate = (torch.arange(301, dtype=torch.float64) * 0.5) / 150
    got = kernels.token_budget(torch.zeros(301, 150), rate, "elbo", None, False)
    assert torch.equal(got, reference.counts(rate, 150, False))


@pytest.mark.parametrize("few", (kernels.FEW, 0), ids=("in registers", "by histograms"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection(dtype, few, monkeypatch):
    monkeypatch.setattr(kernels, "FEW", few)
    for n in (1, 5, 300, 9000):
        scores = torch.randn(4, n)
        scores[1] = (scores[1] * 2).round() / 2  # many ties, zeros of both signs
        if n > 5:
            scores[2, :3], scores[2, 3:5] = math.nan, math.inf
        scores = scores.to(dtype)
        budgets = torch.tensor([[0, n // 2, min(n, 2), n], [n, 1, n // 3, 0], [n - 1, n // 4, n // 2, 1]])
        for budget in budgets if n < 9000 else budgets[:1]:
            for method in ("topk", "threshold"):
                errors = flag()
                got = kernels.select_tokens(scores, budget, method == "threshold", errors)
                assert torch.equal(got, reference.select_tokens(scores, budget, method=method)) and not errors
    errors = flag()
    assert kernels.select_tokens(scores, torch.tensor([-3, 5, 10**10, n]), False, errors).sum(1).tolist() == [
        0,
        5,
        n,
        n,
    ]
    assert errors.item() == kernels.BUDGET
    assert kernels.select_tokens(torch.empty(2, 0), torch.tensor([0, 0]), False, flag()).shape == (2, 0)


def cases():
    for clips, channels, n in (
        (3, 40, 77),
        (1, 300, 40),
        (9, 1, 3),
        (2, 6, 1100),
        (2, 1, 2100),
        (0, 4, 7),
        (2, 4, 0),
    ):
        for layout in ("planar", "channels innermost"):
            x = torch.randint(-(2**15), 2**15, (clips, channels, n))
            if layout == "planar" or n < 100:
                yield (x.mT.contiguous().mT if layout == "channels innermost" else x).to(torch.int16)


@pytest.mark.parametrize("rate", (0.0, 0.4, 1.1))
def test_packing_and_unpacking(rate, monkeypatch):
    monkeypatch.setattr(kernels, "CLIPS", 4)
    for x in cases():
        keep = torch.rand(x.shape[0], x.shape[2]) < rate
        total, mask = int(keep.sum()), keep.view(torch.uint8)
        for capacity in (None, total + 75, total // 2):
            errors = flag()
            got, want = (
                kernels.pack_tokens(x, mask, capacity, errors),
                reference.pack_tokens(x, keep, capacity),
            )
            for a, b in zip(got, want):
                assert a.dtype == b.dtype and torch.equal(a, b)
            assert errors.item() == (kernels.CAPACITY if capacity is not None and total > capacity else 0)
            dense = torch.full((x.shape[0], x.shape[2], x.shape[1]), 99, dtype=x.dtype).mT
            kernels.unpack_tokens(got[0], mask, -7, dense, errors := flag())
            assert torch.equal(dense, reference.unpack_tokens(got[0], keep, -7))
            assert errors.item() == (
                kernels.ROWS if capacity is not None and total > capacity and dense.numel() else 0
            )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
def test_packing_with_fsq(dtype):
    levels = (8, 5, 4)
    basis = torch.tensor([1, 8, 40], dtype=torch.int32)
    z, keep = torch.randn(2, 3, 700).to(dtype), torch.rand(2, 700) < 0.5
    z[0, 1, :50] = math.nan
    want = fsq_quantize(z, levels, backend="reference").indices[keep]
    for capacity in (None, 900):
        table = threshold_table(levels, "vidtok")
        values, _, cu_seqlens = kernels.pack_tokens(z, keep.view(torch.uint8), capacity, flag(), table, basis)
        assert torch.equal(values[: cu_seqlens[-1]], want) and not values[cu_seqlens[-1] :].any()
