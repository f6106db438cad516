"""``accelerate``: walk a model, swap what an adapter knows, check each swap, undo what fails, report."""

from __future__ import annotations

import copy
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vtok_fast import parity
from vtok_fast.dispatch import native
from vtok_fast.swap.adapters import (
    cosmos,
    diffusers_cogvideox,
    diffusers_cosmos,
    diffusers_hunyuan,
    diffusers_vidtok,
    diffusers_wan,
    infotok,
    pad_conv,
    promag,
    vector_quantize,
    vidtok,
)
from vtok_fast.swap.live_memory import peak_bytes
from vtok_fast.swap.patch import Patch, Skip, Swap, why_hooked
from vtok_fast.swap.report import Entry, Report
from vtok_fast.swap.results import close, equal


class Adapter(Protocol):
    """What a module of ``adapters/`` owes. It may also have ``quantizers(model)``: the FSQ quantizers in a
    model whose inputs are latents themselves, each with its levels; their tokens are then judged on an
    example."""

    def propose(self, module: nn.Module) -> list[Swap] | Skip | None:
        """The swaps of a module; a ``Skip`` for one that is known and left alone; None for an unknown one."""
        ...


# Asked in this order; the first that knows a module answers for it.
LIBRARIES: tuple[Adapter, ...] = (
    diffusers_wan,
    diffusers_cogvideox,
    diffusers_hunyuan,
    diffusers_cosmos,
    diffusers_vidtok,
    vector_quantize,
)
ADAPTERS: tuple[Adapter, ...] = (vidtok, cosmos, infotok, promag, *LIBRARIES, pad_conv)

_cache_shares: dict[int, int] = {}  # accelerated model -> bytes of the weight cache it pays for


def accelerate(
    model: nn.Module, *, example: Any = None, check: bool = True, contract: str = "close"
) -> Report:
    """Swaps the ops into ``model``, in place, and reports what was done.

    No module is replaced: single methods of single instances are, so classes, parameters, ``state_dict``
    keys, hooks on untouched modules and references to the modules stay what they are. ``report.revert()``
    gives the model back. A module that is already accelerated is left as it is.

    Args:
        model: any module; those whose kind no adapter knows are left alone and named in the report.
        example: the model's input, a tensor or a tuple of arguments. With it every swap is checked on the
            inputs that it gets there, and the whole model end to end; without, on small random inputs of its
            own.
        check: measure each swap against its contract and undo one that fails.
        contract: "close" may replace arithmetic; "exact" allows only what is bit-equal to the eager chain.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        ValueError: ``contract`` is unknown.
        Exception: whatever the model raises on ``example``; the model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if contract not in parity.CONTRACTS:
        raise ValueError(f"contract: expected one of {', '.join(parity.CONTRACTS)}, got {contract!r}")
    report = Report(contract)
    arguments = None if example is None else example if isinstance(example, tuple) else (example,)
    try:
        candidates = _propose(model, report)
        measured: dict[_Candidate, _Measurement] = {}
        whole: tuple[tuple, tuple] | None = None
        if check and arguments is None:
            measured = {c: _measure(c, _sample(c), {}) for c in candidates if c.swap.sample}
        elif check and arguments is not None:
            measured, whole = _measure_on_example(model, arguments, candidates)
        for c in candidates:
            _install(c, measured.get(c), report)
        if report._patches:
            report._on_revert.append(_share_weight_cache(model))
        if arguments is not None and whole is not None and report._patches:
            _measure_end_to_end(model, arguments, *whole, report)
    except BaseException:
        report.revert()
        raise
    return report


@contextmanager
def accelerated(model: nn.Module, **options: Any) -> Iterator[Report]:
    """``accelerate`` for a block; the model is given back at its end, also after an exception. Blocks may be
    nested.

    Args:
        model, options: as in `accelerate`, which also says what is raised.

    Yields the report of what was swapped.
    """
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        report.revert()


@dataclass(frozen=True, eq=False)
class _Candidate:
    path: str
    module: nn.Module
    swap: Swap


@dataclass(frozen=True)
class _Cost:
    ms: float
    bytes: int


@dataclass(frozen=True)
class _Measurement:
    parity: parity.Parity
    eager: _Cost
    fast: _Cost


def _propose(model: nn.Module, report: Report) -> list[_Candidate]:
    """What the adapters would swap, in the model's order; what stays goes into the report with its reason."""
    candidates: list[_Candidate] = []
    covered: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in covered:
            continue
        answer = next((a for a in (adapter.propose(module) for adapter in ADAPTERS) if a is not None), None)
        why = answer.why if isinstance(answer, Skip) else ""
        swaps = answer if isinstance(answer, list) else []
        if swaps and report.contract == "exact":
            swaps = [
                replace(swap, function=swap.exact, judge=equal)
                for swap in swaps
                if swap.exact is not None and swap.exact_where(module)
            ]
            why = "" if swaps else "the swap replaces arithmetic, which the contract exact does not allow"
        if swaps and any(s.attribute in module.__dict__ for s in swaps):
            why, swaps = "already accelerated, or its forward was replaced by somebody else", []
            covered.update(module.modules())
        for swap in swaps:
            if reason := why_hooked(module, swap.covers):
                why, swaps = reason, []
                break
            inside = [module] if swap.covers is None else [module.get_submodule(name) for name in swap.covers]
            covered.update(m for part in inside for m in part.modules())
        candidates += [_Candidate(path, module, s) for s in swaps]
        if not swaps and (why or _computes(module)):
            report.skipped.append(
                Entry(path, type(module).__name__, why=why or "no adapter knows this kind of module")
            )
    return candidates


def _computes(module: nn.Module) -> bool:
    """Whether a module does something by itself, so that leaving it alone is worth a line."""
    return not list(module.children()) and not isinstance(
        module, (nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict)
    )


def _install(c: _Candidate, measured: _Measurement | None, report: Report) -> None:
    entry = Entry(c.path, type(c.module).__name__, c.swap.what, contract=report.contract)
    if measured is not None:
        entry = replace(
            entry,
            error=measured.parity.error,
            bound=measured.parity.bound,
            eager_ms=measured.eager.ms,
            fast_ms=measured.fast.ms,
            eager_bytes=measured.eager.bytes,
            fast_bytes=measured.fast.bytes,
            note=getattr(measured.parity, "note", ""),
        )
        if not measured.parity.ok:
            report.skipped.append(replace(entry, why=f"failed its contract: {measured.parity}"))
            return
    patch = Patch(c.module, c.swap)
    patch.install()
    report._patches.append(patch)
    report.swapped.append(entry)


# ---- checks ------------------------------------------------------------------------------------------------


def _measure(c: _Candidate, args: tuple, kwargs: dict[str, Any]) -> _Measurement:
    """Runs a copy of the module as it is, in float64, and swapped. The module itself is not touched."""
    probe = copy.deepcopy(c.swap.probe(c.module)).eval()
    with torch.no_grad():
        eager, eager_cost = _measured(getattr(probe, c.swap.attribute), args, kwargs)
        if c.swap.reference is not None:
            ref64 = c.swap.reference(probe, *args, **kwargs), None
        else:
            double = copy.deepcopy(probe).double()
            ref64 = _call(getattr(double, c.swap.attribute), _to_double(args), _to_double(kwargs))
            del double
        Patch(probe, c.swap).install()
        fast, fast_cost = _measured(getattr(probe, c.swap.attribute), args, kwargs)
    if c.swap.judge is not None:
        return _Measurement(c.swap.judge(fast[0], eager[0], ref64[0]), eager_cost, fast_cost)
    return _Measurement(close(fast, eager, ref64), eager_cost, fast_cost)


def _call(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The result, and the arguments' lists and dicts (feature caches) as the call left them; the caller's own
    are not touched."""
    args, kwargs = _containers(args), _containers(kwargs)
    result = function(*args, **kwargs)
    return result, [v for v in (*args, *kwargs.values()) if isinstance(v, (list, dict))]


def _containers(value: Any) -> Any:
    """The same tensors in fresh tuples, lists and dicts."""
    if type(value) in (tuple, list):
        return type(value)(_containers(v) for v in value)
    if type(value) is dict:
        return {k: _containers(v) for k, v in value.items()}
    return value


def _measured(function: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple[Any, Any], _Cost]:
    """What `_call` gives; the shortest of three runs in milliseconds, and the most memory that its
    tensors took."""
    best = float("inf")
    for _ in range(3):
        _wait_for_gpu()
        start = time.perf_counter()
        result = _call(function, args, kwargs)
        _wait_for_gpu()
        best = min(best, time.perf_counter() - start)
    return result, _Cost(best * 1e3, peak_bytes(_call, function, args, kwargs))


def _wait_for_gpu() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _to_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_to_double(v) for v in value)
    if type(value) is dict:
        return {k: _to_double(v) for k, v in value.items()}
    return value


def _measure_on_example(model: nn.Module, args: tuple, candidates: list[_Candidate]) -> tuple[dict, tuple]:
    """Measures each candidate on the first inputs that it gets, while the model runs as it is; also the
    model's own result."""
    measured: dict[_Candidate, _Measurement] = {}
    handles = []
    for c in candidates:
        if c.swap.sample is None:
            continue
        if c.swap.attribute != "forward":  # no hook sees such a call
            measured[c] = _measure(c, _sample(c), {})
            continue

        def hook(module: nn.Module, args: tuple, kwargs: dict, c: _Candidate = c) -> None:
            if c not in measured:
                measured[c] = _measure(replace(c, module=_without_hooks(module)), args, kwargs)

        handles.append(c.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        eager = _run(model, args)
    finally:
        for handle in handles:
            handle.remove()
    return measured, (eager, _run(copy.deepcopy(model).double(), _to_double(args)))


def _sample(c: _Candidate) -> tuple:
    """The candidate's random arguments, the same every time and without touching the program's random
    numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return () if c.swap.sample is None else c.swap.sample(c.module)


def _run(model: nn.Module, args: tuple) -> tuple[Any, list[tuple[Tensor, tuple[int, ...]]]]:
    """The model's result, and on the way the latents that its FSQ quantizers got, with their levels."""
    latents: list[tuple[Tensor, tuple[int, ...]]] = []
    handles = [
        module.register_forward_pre_hook(lambda _, inputs, levels=levels: latents.append((inputs[0], levels)))
        for adapter in ADAPTERS
        if hasattr(adapter, "quantizers")
        for module, levels in adapter.quantizers(model)
    ]
    try:
        with torch.no_grad():
            return model(*args), latents
    finally:
        for handle in handles:
            handle.remove()


def _without_hooks(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._forward_pre_hooks = type(module._forward_pre_hooks)()
    clone._forward_pre_hooks_with_kwargs = type(module._forward_pre_hooks_with_kwargs)()
    return clone


def _measure_end_to_end(model: nn.Module, args: tuple, eager: tuple, ref64: tuple, report: Report) -> None:
    fast = _run(model, args)
    p = close(fast[0], eager[0], ref64[0])
    report.end_to_end = Entry(
        "",
        type(model).__name__,
        "end to end",
        "" if p.ok else f"beyond its contract: {p}",
        "close",
        p.error,
        p.bound,
    )
    for (z, levels), (z_eager, _), (z64, _) in zip(fast[1], eager[1], ref64[1]):
        report.tokens.append(parity.tokens(z, z_eager, z64, levels))


# ---- the cache of transformed weights ----------------------------------------------------------------------


def _share_weight_cache(model: nn.Module) -> Any:
    """Grants the native weight cache this model's own bytes, or what VTOK_FAST_WEIGHT_CACHE says; returns how
    to take them back."""
    key = id(model)
    own = sum(p.numel() * p.element_size() for p in model.parameters())
    _set_weight_cache(sum(_cache_shares.values()) + own)
    _cache_shares[key] = own

    def give_back() -> None:
        if _cache_shares.pop(key, None) is not None:
            _set_weight_cache(sum(_cache_shares.values()))

    weakref.finalize(model, give_back)
    return give_back


def _set_weight_cache(shares: int) -> None:
    if (lib := native.lib()) is not None:
        bound = os.environ.get("VTOK_FAST_WEIGHT_CACHE")
        if bound is not None and not bound.isdigit():
            raise ValueError(f"VTOK_FAST_WEIGHT_CACHE: expected a number of bytes, got {bound!r}")
        lib.set_weight_cache(int(bound) if bound is not None else shares)
