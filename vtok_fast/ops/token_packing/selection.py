"""The first half of ``token_packing``: score the tokens of a video, and choose how many and which to keep."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.dispatch.lasting import is_recording, to_device
from vtok_fast.ops.token_packing.packed_tokens import BUDGET, error_flag, note_error
from vtok_fast.reference import token_packing as reference

METHODS = reference.METHODS
STRATEGIES = reference.STRATEGIES
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that the kernels know


class ScoresCall(NamedTuple):
    """One checked call of each op, as backends see it."""

    video: Tensor
    reconstruction: Tensor
    grid: tuple[int, int, int]


class SelectCall(NamedTuple):
    scores: Tensor
    budget: Tensor
    method: str
    stride: int
    rate: Tensor | None = None  # float32 (B,): ``threshold`` by quantile; the budget is then its count


class BudgetCall(NamedTuple):
    scores: Tensor
    rate: Tensor  # float64, one or (B,)
    strategy: str
    elbo_mean: Tensor | None
    released: bool


# ---- scores ------------------------------------------------------------------------------------------------


def router_scores(
    video: Tensor, reconstruction: Tensor, grid: Sequence[int] = (4, 8, 8), *, backend: str | None = None
) -> Tensor:
    """InfoTok's router: the mean absolute error of each token's pixels, in one pass over both videos.

    Frame 0 is a group of its own; the others form groups of ``grid[0]``. Contract: *exact*. The mean is
    defined on integers, since a sum of floats depends on its order: each |video - reconstruction|, computed
    in float32, is cut to a multiple of 2^-30 and to at most 4096, the sum is exact, and it is divided in
    float64. Against a plain mean, at most 2^-30 is lost. A difference that is NaN makes its token's score
    NaN. No gradient.

    Args:
        video, reconstruction: (B, C, 1 + k grid[0], H, W), float32, float64, bfloat16 or float16, the same;
            any strides.
        grid: frames, rows and columns of pixels per token; rows and columns must divide H and W.

    Returns:
        (B, t, H / grid[1], W / grid[2]) with t = 1 + k, float32 (float64 for float64).

    Raises:
        TypeError: not floating point, or two dtypes.
        ValueError: shapes or grid do not fit; names the argument and its value.
        BackendError: ``backend`` cannot run this call.
    """
    if not video.is_floating_point():
        raise TypeError(f"video: expected a floating point dtype, got {video.dtype}")
    if reconstruction.dtype != video.dtype:
        raise TypeError(
            f"reconstruction: expected the dtype of video, {video.dtype}, got {reconstruction.dtype}"
        )
    if video.dim() != 5 or video.shape[1] == 0 or video.shape[2] == 0:
        raise ValueError(
            f"video: expected (B, C, T, H, W) with a channel and a frame, got shape {tuple(video.shape)}"
        )
    if reconstruction.shape != video.shape or reconstruction.device != video.device:
        raise ValueError(
            f"reconstruction: expected the shape and device of video, {tuple(video.shape)} on "
            f"{video.device}, got "
            f"{tuple(reconstruction.shape)} on {reconstruction.device}"
        )
    grid = tuple(map(operator.index, grid))
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"grid: expected (frames, rows, columns) per token, each at least 1, got {grid}")
    for name, size, step in (
        ("frames after the first", video.shape[2] - 1, grid[0]),
        ("rows", video.shape[3], grid[1]),
        ("columns", video.shape[4], grid[2]),
    ):
        if size % step:
            raise ValueError(f"grid: {grid} must divide video, whose {name} are {size}")
    if video.shape[1] * math.prod(grid) > reference.MAX_COUNT:
        raise ValueError(
            f"grid: at most {reference.MAX_COUNT} values per token, got {grid} of {video.shape[1]} channels"
        )
    call = ScoresCall(video.detach(), reconstruction.detach(), grid)
    if native.is_plain(call.video, call.reconstruction):
        return backends.select("router_scores", call, backend).run(call)
    return torch.ops.vtok_fast.router_scores(*call, backend)


# ---- budget ------------------------------------------------------------------------------------------------


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
    call = _budget_call(scores, rate, strategy, elbo_mean, decay, released)
    tokens = math.prod(scores.shape[1:])
    if call.strategy == "elbo" and not isinstance(rate, Tensor):  # nothing to compute on the device
        count = int(reference.counts(call.rate, tokens, released))
        return torch.full((scores.shape[0],), count, dtype=torch.int64, device=scores.device)
    if tokens == 0:
        return torch.zeros(scores.shape[0], dtype=torch.int64, device=scores.device)
    if not native.is_plain(call.scores, call.rate, call.elbo_mean):
        return _budget_reference_run(call)
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
    call = _budget_call(scores, rate, strategy, elbo_mean, decay, released=False)
    if call.strategy == "elbo" and not isinstance(rate, Tensor):
        return torch.full((scores.shape[0],), rate, dtype=torch.float32, device=scores.device)
    if not math.prod(scores.shape[1:]):
        return call.rate.float().expand(scores.shape[0]).clamp(0, 1)
    return reference.rates(*call[:4]).clamp(0, 1).float()


def _budget_call(
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


# ---- selection ---------------------------------------------------------------------------------------------


def select_tokens(
    scores: Tensor,
    budget: int | Sequence[int] | Tensor | None = None,
    *,
    rate: float | Tensor | None = None,
    method: str = "topk",
    stride: int = 4,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Which tokens to keep, over each clip as a whole or a prefix of each block. Contract: *exact*. Methods:

    - ``topk``: exactly the budget, highest scores first, NaN before them; among equals the earlier position;
    - ``threshold``: scores strictly above the (budget + 1)-th largest: ties at the bound are dropped. A
      budget of all tokens keeps all. With a ``rate`` in place of a budget, what InfoTok's code keeps: the
      scores above ``torch.quantile(scores.float(), float(1 - rate))``, compared in their own dtype, bit for
      bit (a clip with a NaN keeps nothing);
    - ``order``: the first tokens of every block ``scores[b, i]``, as ElasticTok and AdapTok; scores count
      only by their shape;
    - ``order_strided``: the same in the order 0, stride, 2 stride, ..., 1, stride + 1, ...

    Args:
        scores: (B, ...), floating point; for the orders (B, blocks, ...).
        budget: tokens to keep: one number, or (B,), or for the orders also (B, blocks) per block. Numbers and
            tensors on the CPU are checked (under torch.compile clamped). Those of a tensor on a GPU only with
            ``validate``, which waits for it; otherwise they are clamped, and the next call that waits for the
            device raises.
        rate: with ``threshold``, in place of a budget: 0 to 1, one number or a tensor (B,), rounded to
            float32; a tensor's values are clamped, not checked.
        stride: of ``order_strided``.

    Returns:
        bool, the shape of ``scores``, contiguous.

    Raises:
        TypeError, ValueError: an argument does not fit; names it and its value.
        BackendError: ``backend`` cannot run this call.
    """
    if not scores.is_floating_point():
        raise TypeError(f"scores: expected a floating point dtype, got {scores.dtype}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    ordered = method in ("order", "order_strided")
    if scores.dim() < (3 if ordered else 2):
        raise ValueError(
            f"scores: expected (B, {'blocks, ' if ordered else ''}...), got shape {tuple(scores.shape)}"
        )
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"stride: expected a positive int, got {stride!r}")
    if (rate is None) == (budget is None) or rate is not None and method != "threshold":
        raise ValueError(
            f"rate: stands in place of a budget with method 'threshold', got {rate!r}, budget {budget!r} and "
            f"method {method!r}"
        )
    if rate is not None:
        call = _quantile_call(scores.detach(), rate, stride)
    else:
        assert budget is not None  # checked
        call = SelectCall(scores.detach(), _checked_budget(scores, budget, ordered, validate), method, stride)
    if native.is_plain(call.scores, call.budget, call.rate):
        return backends.select("select_tokens", call, backend).run(call)
    return torch.ops.vtok_fast.select_tokens(*call, backend)


def _quantile_call(scores: Tensor, rate: float | Tensor, stride: int) -> SelectCall:
    """The call that keeps what is above a quantile."""
    clips = scores.shape[0]
    if isinstance(rate, Tensor):
        if rate.numel() != 1 and rate.shape != (clips,):
            raise ValueError(f"rate: expected one or ({clips},) values, got shape {tuple(rate.shape)}")
        rates = to_device(rate.reshape(-1), scores.device, torch.float32, "rate")
        rates = rates.clamp(0, 1).expand(clips).contiguous()
    elif not 0 <= rate <= 1:
        raise ValueError(f"rate: expected 0 to 1, got {rate!r}")
    else:
        rates = torch.full((clips,), rate, dtype=torch.float32, device=scores.device)
    budget = reference.counts(rates, math.prod(scores.shape[1:]), released=True)
    return SelectCall(scores, budget, "threshold", stride, rates)


def _checked_budget(
    scores: Tensor, budget: int | Sequence[int] | Tensor, ordered: bool, validate: bool
) -> Tensor:
    """int64 (B,) or (B, blocks) on the device of the scores."""
    size = math.prod(scores.shape[2 if ordered else 1 :])
    given = budget if isinstance(budget, Tensor) else torch.tensor(budget, device="cpu")
    if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"budget: expected integers, got {given.dtype}")
    allowed = [(), scores.shape[:1]] + ([scores.shape[:2]] if ordered else [])
    if given.shape not in allowed:
        shapes = " or ".join(str(tuple(s)) for s in allowed[1:])
        raise ValueError(f"budget: expected a number or shape {shapes}, got {tuple(given.shape)}")
    if (given.is_cpu or validate) and given.numel() and not torch.compiler.is_compiling():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high > size:
            raise ValueError(
                f"budget: expected 0 to {size}, the tokens of a {'block' if ordered else 'clip'}, got "
                f"{low if low < 0 else high}"
            )
    if given.dim() == 0 and not isinstance(budget, Tensor):  # a copy from the host would wait
        given = torch.full(scores.shape[:1], cast(int, budget), dtype=torch.int64, device=scores.device)
    elif not isinstance(budget, Tensor) and is_recording(
        scores.device
    ):  # numbers, which replays may not read
        fills = [torch.full((), n, dtype=torch.int64, device=scores.device) for n in given.flatten().tolist()]
        given = torch.stack(fills).view(given.shape) if fills else given.new_empty(0, device=scores.device)
    given = to_device(given, scores.device, torch.int64, "budget")
    if given.dim() == 0:
        given = given.expand(scores.shape[0])
    return given.contiguous()


# ---- backends ----------------------------------------------------------------------------------------------


def _why_not_scores_cpu(call: ScoresCall) -> backends.Reason:
    return native.why_not_on_cpu(call.video, DTYPES)


def _scores_output(call: ScoresCall) -> Tensor:
    b, _, t, h, w = call.video.shape
    frames, rows, columns = call.grid
    wide = torch.float64 if call.video.dtype == torch.float64 else torch.float32
    return call.video.new_empty((b, 1 + (t - 1) // frames, h // rows, w // columns), dtype=wide)


def _scores_cpu_run(call: ScoresCall) -> Tensor:
    scores = _scores_output(call)
    arg = native.arg
    native.lib().router_scores(
        arg(call.video), arg(call.reconstruction), arg(scores), *call.grid, native.threads()
    )
    return scores


def _why_not_select_cpu(call: SelectCall) -> backends.Reason:
    if call.method not in ("topk", "threshold"):
        return f"method={call.method!r} is one comparison, which PyTorch does"
    return native.why_not_on_cpu(call.scores, DTYPES)


def _select_cpu_run(call: SelectCall) -> Tensor:
    scores = call.scores.contiguous()
    keep = scores.new_empty(scores.shape, dtype=torch.bool)
    arg = native.arg
    native.lib().select_tokens(
        arg(scores.flatten(1)),
        arg(call.budget),
        arg(keep.view(torch.uint8).flatten(1)),
        call.method == "threshold",
        native.threads(),
    )
    return _above_quantile(call, keep)


def _above_quantile(call: SelectCall, keep: Tensor) -> Tensor:
    """``keep``; of a call with a rate, what it keeps by that, given the scores above the quantile's lower
    neighbor. Nothing waits for a value."""
    if call.rate is None or not keep.numel():
        return keep
    scores, keep = call.scores.flatten(1), keep.flatten(1)
    _, weight = reference.quantile_rank(call.rate, scores.shape[1])
    below = scores.masked_fill(keep, -torch.inf).amax(1)
    next_above = scores.masked_fill(~keep, torch.inf).amin(1)
    has_next = (weight > 0) & (keep.sum(1) == call.budget)  # otherwise both neighbors are the same score
    above = torch.where(has_next, next_above, below)
    bound = torch.lerp(below.float(), above.float(), weight).masked_fill(scores.isnan().any(1), torch.nan)
    return (scores > bound.to(scores.dtype)[:, None]).view(call.scores.shape)


def _select_reference_run(call: SelectCall) -> Tensor:
    if call.rate is not None:
        return reference.above_quantile(call.scores, call.rate)
    size = math.prod(call.scores.shape[1 if call.method in ("topk", "threshold") else 2 :])
    note_error((call.budget < 0) | (call.budget > size), BUDGET)
    return reference.select_tokens(call.scores, call.budget, method=call.method, stride=call.stride)


def _budget_reference_run(call: BudgetCall) -> Tensor:
    rates = reference.rates(call.scores, call.rate, call.strategy, call.elbo_mean)
    return reference.counts(rates, math.prod(call.scores.shape[1:]), call.released)


def _why_not_budget_triton(call: BudgetCall) -> backends.Reason:
    if call.scores.dtype not in DTYPES:
        return f"no {call.scores.dtype} kernel"
    return backends.why_not_triton_on(call.scores)


@tuning.guarded("token_packing")
def _budget_triton_run(call: BudgetCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    scores, rate = call.scores.contiguous().flatten(1), call.rate.contiguous()
    return kernels.token_budget(scores, rate, call.strategy, call.elbo_mean, call.released)


def _why_not_scores_triton(call: ScoresCall) -> backends.Reason:
    if call.video.dtype not in DTYPES:
        return f"no {call.video.dtype} kernel"
    return backends.why_not_triton_on(call.video)


@tuning.guarded("token_packing")
def _scores_triton_run(call: ScoresCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    return kernels.router_scores(*call)


def _why_not_select_triton(call: SelectCall) -> backends.Reason:
    if call.method not in ("topk", "threshold"):
        return f"method={call.method!r} is one comparison, which PyTorch does"
    if call.scores.dtype not in DTYPES:
        return f"no {call.scores.dtype} kernel"
    if call.scores.shape[0] and math.prod(call.scores.shape[1:]) >= 2**31:
        return "2**31 or more tokens in a clip"
    return backends.why_not_triton_on(call.scores)


@tuning.guarded("token_packing")
def _select_triton_run(call: SelectCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    scores = call.scores.contiguous().flatten(1)
    strictly, flag = call.method == "threshold", error_flag(scores.device)
    keep = kernels.select_tokens(scores, call.budget, strictly, flag).view(call.scores.shape)
    return _above_quantile(call, keep)


backends.register(
    "router_scores",
    backends.Backend("triton", _why_not_scores_triton, _scores_triton_run),
    backends.Backend("cpu", _why_not_scores_cpu, _scores_cpu_run),
    backends.Backend("reference", lambda call: None, lambda call: reference.router_scores(*call)),
)
backends.register(
    "token_budget",
    backends.Backend("triton", _why_not_budget_triton, _budget_triton_run),
    backends.Backend("reference", lambda call: None, _budget_reference_run),
)
backends.register(
    "select_tokens",
    backends.Backend("triton", _why_not_select_triton, _select_triton_run),
    backends.Backend("cpu", _why_not_select_cpu, _select_cpu_run),
    backends.Backend("reference", lambda call: None, _select_reference_run),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::router_scores", "(Tensor video, Tensor reconstruction, int[] grid, str? backend) -> Tensor"
)
torch.library.define(
    "vtok_fast::select_tokens",
    "(Tensor scores, Tensor budget, str method, int stride, Tensor? rate, str? backend) -> Tensor",
)


@torch.library.impl("vtok_fast::router_scores", ("cpu", "cuda"))
def _scores_impl(video, reconstruction, grid, backend):
    call = ScoresCall(video, reconstruction, tuple(grid))
    return backends.select("router_scores", call, backend).run(call)


@torch.library.register_fake("vtok_fast::router_scores")
def _scores_fake(video, reconstruction, grid, backend):
    return _scores_output(ScoresCall(video, reconstruction, tuple(grid)))


@torch.library.impl("vtok_fast::select_tokens", ("cpu", "cuda"))
def _select_impl(scores, budget, method, stride, rate, backend):
    call = SelectCall(scores, budget, method, stride, rate)
    return backends.select("select_tokens", call, backend).run(call)


@torch.library.register_fake("vtok_fast::select_tokens")
def _select_fake(scores, budget, method, stride, rate, backend):
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
