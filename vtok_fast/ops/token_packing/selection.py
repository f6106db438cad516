"""``select_tokens``: which tokens of each clip to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from vtok_fast.dispatch import backends, native, tuning
from vtok_fast.dispatch.lasting import is_recording, to_device
from vtok_fast.ops.token_packing.packed_tokens import BUDGET, error_flag, note_error
from vtok_fast.ops.token_packing.scores import DTYPES
from vtok_fast.reference import token_packing as reference

METHODS = reference.METHODS


class SelectCall(NamedTuple):
    """One checked call, as backends see it."""

    scores: Tensor
    budget: Tensor
    method: str
    stride: int
    rate: Tensor | None = None  # float32 (B,): ``threshold`` by quantile; the budget is then its count


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


def _why_not_cpu(call: SelectCall) -> backends.Reason:
    if call.method not in ("topk", "threshold"):
        return f"method={call.method!r} is one comparison, which PyTorch does"
    return native.why_not_on_cpu(call.scores, DTYPES)


def _run_cpu(call: SelectCall) -> Tensor:
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


def _run_reference(call: SelectCall) -> Tensor:
    if call.rate is not None:
        return reference.above_quantile(call.scores, call.rate)
    size = math.prod(call.scores.shape[1 if call.method in ("topk", "threshold") else 2 :])
    note_error((call.budget < 0) | (call.budget > size), BUDGET)
    return reference.select_tokens(call.scores, call.budget, method=call.method, stride=call.stride)


def _why_not_triton(call: SelectCall) -> backends.Reason:
    if call.method not in ("topk", "threshold"):
        return f"method={call.method!r} is one comparison, which PyTorch does"
    if call.scores.dtype not in DTYPES:
        return f"no {call.scores.dtype} kernel"
    if call.scores.shape[0] and math.prod(call.scores.shape[1:]) >= 2**31:
        return "2**31 or more tokens in a clip"
    return backends.why_not_triton_on(call.scores)


@tuning.guarded("token_packing")
def _run_triton(call: SelectCall) -> Tensor:
    from vtok_fast.kernels import token_packing as kernels

    scores = call.scores.contiguous().flatten(1)
    strictly, flag = call.method == "threshold", error_flag(scores.device)
    keep = kernels.select_tokens(scores, call.budget, strictly, flag).view(call.scores.shape)
    return _above_quantile(call, keep)


backends.register(
    "select_tokens",
    backends.Backend("triton", _why_not_triton, _run_triton),
    backends.Backend("cpu", _why_not_cpu, _run_cpu),
    backends.Backend("reference", lambda call: None, _run_reference),
)

# ---- torch.library -----------------------------------------------------------------------------------------

torch.library.define(
    "vtok_fast::select_tokens",
    "(Tensor scores, Tensor budget, str method, int stride, Tensor? rate, str? backend) -> Tensor",
)


@torch.library.impl("vtok_fast::select_tokens", ("cpu", "cuda"))
def _impl(scores, budget, method, stride, rate, backend):
    call = SelectCall(scores, budget, method, stride, rate)
    return backends.select("select_tokens", call, backend).run(call)


@torch.library.register_fake("vtok_fast::select_tokens")
def _fake(scores, budget, method, stride, rate, backend):
    return torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
