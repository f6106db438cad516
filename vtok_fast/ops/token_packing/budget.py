"""``token_budget``: how many tokens of each clip to keep."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.dispatch.lasting import to_device
from vtok_fast.ops.token_packing.scores import DTYPES
from vtok_fast.reference import token_packing as reference

STRATEGIES = reference.STRATEGIES


class BudgetCall(NamedTuple):
    """One checked call, as backends see it."""

    scores: Tensor
    rate: Tensor  # float64, one or (B,)
    strategy: str
    elbo_mean: Tensor | None
    released: bool


def token_budget(
    scores: Tensor,
    rate: float | Tensor,
    *,
    strategy: str = "elbo",
    elbo_mean: float | Tensor | None = None,
    decay: float = 0.99,
    released: bool = False,
    backend: str | None = None,
) -> Tensor:
    """How many tokens of each clip to keep: int64 (B,) on the device of ``scores``, which is never waited
    for.

    A rate r of n tokens is floor(r n + 1/2); with ``released``, n - 1 - floor((1 - r)(n - 1)) in float32, the
    number that InfoTok's code keeps of different scores (at rate 1 it drops one token). Strategies:

    - ``elbo``: the same rate for every clip (the scores say only which tokens);
    - ``global_elbo``: rate times the clip's mean score by ``elbo_mean``, the mean over a data set, at least
      1/16 and at most 1;
    - ``bin``: that, rounded to a multiple of 1/4 (half to even) first;
    - ``elbo_ema``: as ``global_elbo`` with a running mean for training: this call first sets ``elbo_mean``,
      in place, to decay x elbo_mean + (1 - decay) x the mean of these clips. One that is NaN starts with that
      mean.

    Means are exact sums as in `router_scores`, so every backend counts the same. Source: InfoTok, arXiv
    2512.16975, equation 4, and its code.

    Args:
        scores: (B, ...), floating point, at most 2^20 tokens a clip.
        rate: 0 to 1, one number or a tensor (B,); a tensor's values are clamped, not checked.
        elbo_mean: a positive number or a tensor of one element; for ``elbo_ema`` a float tensor on the device
            of ``scores``.
        decay: of ``elbo_ema``, 0 to 1.
        backend: a name to insist on; else the best that can run. A count that depends on no tensor is made
            on the host.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and its value.
        BackendError: ``backend`` cannot run this call.
    """
    call = _checked(scores, rate, strategy, elbo_mean, decay, released)
    tokens = math.prod(scores.shape[1:])
    if call.strategy == "elbo" and not isinstance(rate, Tensor):  # nothing to compute on the device
        count = int(reference.counts(call.rate, tokens, released))
        return torch.full((scores.shape[0],), count, dtype=torch.int64, device=scores.device)
    if tokens == 0:
        return torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    if not native.is_plain(call.scores, call.rate, call.elbo_mean):
        return _run_reference(call)
    return backends.select("token_budget", call, backend).run(call)


def token_rates(
    scores: Tensor,
    rate: float | Tensor,
    *,
    strategy: str = "elbo",
    elbo_mean: float | Tensor | None = None,
    decay: float = 0.99,
) -> Tensor:
    """The share of each clip's tokens to keep, float32 (B,) on the device of ``scores``: what `token_budget`
    counts. Arguments and errors are those of `token_budget`."""
    call = _checked(scores, rate, strategy, elbo_mean, decay, released=False)
    if call.strategy == "elbo" and not isinstance(rate, Tensor):
        return torch.full((scores.shape[0],), rate, dtype=torch.float32, device=scores.device)
    if not math.prod(scores.shape[1:]):
        return call.rate.float().expand(scores.shape[0]).clamp(0, 1)
    return reference.rates(*call[:4]).clamp(0, 1).float()


def _checked(
    scores: Tensor,
    rate: float | Tensor,
    strategy: str,
    elbo_mean: float | Tensor | None,
    decay: float,
    released: bool,
) -> BudgetCall:
    """The checked call; moves the running mean of ``elbo_ema``."""
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating point dtype, got {scores.dtype}")
    if scores.dim() < 2:
        raise ValueError(f"scores: expected (B, ...), got shape {tuple(scores.shape)}")
    tokens = math.prod(scores.shape[1:])
    if tokens > reference.MAX_COUNT:
        raise ValueError(f"scores: at most {reference.MAX_COUNT} tokens a clip, got {tokens}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy!r}")
    if isinstance(rate, Tensor):
        if rate.numel() != 1 and rate.shape != scores.shape[:1]:
            raise ValueError(
                f"rate: expected one or ({scores.shape[0]},) values, got shape {tuple(rate.shape)}"
            )
        rate = to_device(rate.reshape(-1), scores.device, torch.float64, "rate")
    elif not 0 <= rate <= 1:
        raise ValueError(f"rate: expected 0 to 1, got {rate!r}")
    else:  # one that decides by itself stays on the host
        device = torch.device("cpu") if strategy == "elbo" else scores.device
        rate = torch.full((1,), rate, dtype=torch.float64, device=device)
    mean: Tensor | None = None
    if strategy != "elbo":
        mean = _mean_tensor(elbo_mean, strategy, scores.device)
        if strategy == "elbo_ema":
            if not 0 <= decay <= 1:
                raise ValueError(f"decay: expected 0 to 1, got {decay!r}")
            if scores.numel():
                reference.update_mean(mean, scores.detach(), decay)
    return BudgetCall(scores.detach(), rate, strategy, mean, released)


def _mean_tensor(elbo_mean: float | Tensor | None, strategy: str, device: torch.device) -> Tensor:
    if isinstance(elbo_mean, Tensor):
        if elbo_mean.numel() != 1 or not elbo_mean.is_floating_point():
            raise ValueError(
                f"elbo_mean: expected one floating point value, got {elbo_mean.dtype} "
                f"{tuple(elbo_mean.shape)}"
            )
        if elbo_mean.device != device:
            raise ValueError(f"elbo_mean: expected the device of scores, {device}, got {elbo_mean.device}")
        return elbo_mean
    if strategy == "elbo_ema":
        raise TypeError(f"elbo_mean: strategy 'elbo_ema' moves a tensor in place, got {elbo_mean!r}")
    if elbo_mean is None or not 0 < elbo_mean < math.inf:
        raise ValueError(
            f"elbo_mean: strategy {strategy!r} needs the mean score of the data, a positive number, got "
            f"{elbo_mean!r}"
        )
    return torch.full((1,), elbo_mean, dtype=torch.float64, device=device)


# ---- backends ----------------------------------------------------------------------------------------------


def _run_reference(call: BudgetCall) -> Tensor:
    rates = reference.rates(call.scores, call.rate, call.strategy, call.elbo_mean)
    return reference.counts(rates, math.prod(call.scores.shape[1:]), call.released)


def _why_not_triton(call: BudgetCall) -> backends.Reason:
    if call.scores.dtype not in DTYPES:
        return f"no {call.scores.dtype} kernel"
    return backends.why_not_triton_on(call.scores)


@tuning.guarded("token_packing")
def _run_triton(call: BudgetCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    scores, rate = call.scores.contiguous().flatten(1), call.rate.contiguous()
    return kernels.token_budget(scores, rate, call.strategy, call.elbo_mean, call.released)


backends.register(
    "token_budget",
    backends.Backend("triton", _why_not_triton, _run_triton),
    backends.Backend("reference", lambda call: None, _run_reference),
)
