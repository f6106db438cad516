"""InfoTok's released code keeps the scores above `torch.quantile(scores.float(), float(1 - rate))`: float32
decides the rank, and the rounding of the interpolation whether a score at the bound is kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtok_fast import select_tokens, token_budget
from vtok_fast.dispatch import native
from vtok_fast.models import InfoTok
from vtok_fast.ops.token_packing import selection, token_rates
from vtok_fast.reference import token_packing as reference

BACKENDS = (
    "reference",
    pytest.param("cpu", marks=pytest.mark.skipif(native.lib() is None, reason="not built")),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def released(scores: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
    """As the released code does it, clip by clip."""
    return torch.stack([s > torch.quantile(s.float(), float(1 - r)) for s, r in zip(scores, rates)])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_every_bit(backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    tokens = data.draw(st.integers(1, 300))
    rates = torch.tensor(
        data.draw(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=3)), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    scores = torch.rand(len(rates), tokens, generator=generator)
    kind = data.draw(st.sampled_from(("spread", "neighbors", "ties", "signed", "infinite", "nan")))
    if kind == "neighbors":  # so near that interpolation rounds to one of the two
        steps = torch.randint(0, 2 * tokens, scores.shape, generator=generator)
        scores = 1 + steps * torch.finfo(dtype).eps
    elif kind == "ties":
        scores = (scores * 4).round()
    elif kind == "signed":
        scores = (scores - 0.5) * 1e-6
    elif kind == "infinite":
        scores = scores.masked_fill(scores > 0.7, torch.inf).masked_fill(scores < 0.2, -torch.inf)
    elif kind == "nan":
        scores[0, 0] = torch.nan
    scores = scores.to(dtype)
    got = select_tokens(scores, rate=rates, method="threshold", backend=backend)
    assert torch.equal(got, released(scores, rates))
    number = float(rates[0])
    assert torch.equal(select_tokens(scores[:1], rate=number, method="threshold", backend=backend), got[:1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", (2, 36, 9216, 34020, 2**20))
def test_ranks_are_float32(tokens, backend):
    """Rates at which float64 would count one token more or less."""
    scores = torch.randperm(tokens, generator=torch.Generator().manual_seed(1)).float().view(1, -1)
    rates = [
        0.0,
        0.1,
        0.3,
        0.7,
        0.9,
        1.0,
        *torch.rand(4, generator=torch.Generator().manual_seed(0)).tolist(),
    ]
    rates += [
        1 - k / (tokens - 1) for k in range(1, tokens, max(tokens // 7, 1))
    ]  # a whole rank, before rounding
    differs = 0
    for rate in rates:
        want = released(scores, torch.tensor([rate], dtype=torch.float32))
        count = token_budget(scores, rate, released=True)
        assert int(count) == int(token_budget(scores, torch.tensor(rate), released=True))
        if tokens < 2**20:  # where neighboring scores differ by more than a rounding
            assert int(count) == int(want.sum())
        assert torch.equal(select_tokens(scores, rate=rate, method="threshold", backend=backend), want)
        differs += int(count) != tokens - 1 - int((1 - rate) * (tokens - 1))
    assert differs or tokens < 9216


def test_a_device_would_get_the_same_bits(monkeypatch):
    """What follows the selection on a GPU is what follows it on a CPU: plain PyTorch, given the same mask."""
    seen = []
    monkeypatch.setattr(
        selection,
        "_above_quantile",
        lambda call, keep, f=selection._above_quantile: seen.append(keep) or f(call, keep),
    )
    scores = torch.rand(3, 50).bfloat16()
    rates = torch.tensor([0.2, 0.5, 0.9])
    if native.lib() is not None:
        select_tokens(scores, rate=rates, method="threshold", backend="cpu")
        budget = reference.counts(rates, 50, True)
        assert torch.equal(seen[0], reference.select_tokens(scores, budget, method="threshold"))


def test_the_model_keeps_what_the_release_keeps():
    model = InfoTok(next(name for name in InfoTok.Config.presets if name != "flex-4x8x8")).eval()
    scores = torch.rand(3, 2, 4, 4).square()
    for rate in (0.1, 0.33, 0.5, 0.77, 1.0):
        kept = model.keep(scores, rate=rate, selection="threshold")
        want = released(scores.flatten(1), torch.full((3,), rate))
        assert torch.equal(kept.flatten(1), want)
    by = {"strategy": "global_elbo", "elbo_mean": 0.4}
    kept = model.keep(scores, rate=0.5, selection="threshold", rate_strategy="global_elbo", elbo_mean=0.4)
    assert torch.equal(kept.flatten(1), released(scores.flatten(1), token_rates(scores, 0.5, **by)))


def test_compiles_and_refuses():
    torch._dynamo.reset()
    scores, rates = torch.rand(2, 40), torch.tensor([0.3, 0.8])
    compiled = torch.compile(
        lambda s, r: select_tokens(s, rate=r, method="threshold"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(scores, rates), released(scores, rates))
    with pytest.raises(ValueError, match="rate: stands in place of a budget"):
        select_tokens(scores, 3, rate=0.5, method="threshold")
    with pytest.raises(ValueError, match="rate: stands in place of a budget"):
        select_tokens(scores, rate=0.5)
    with pytest.raises(ValueError, match="rate: expected 0 to 1, got 1.5"):
        select_tokens(scores, rate=1.5, method="threshold")
    assert select_tokens(torch.empty(0, 4), rate=0.5, method="threshold").shape == (0, 4)
    assert select_tokens(torch.empty(2, 0), rate=0.5, method="threshold").shape == (2, 0)
