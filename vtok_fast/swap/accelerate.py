"""``accelerate``: walk a model, swap what an adapter knows, check each swap, undo what fails, report."""

from __future__ import annotations

import copy
import math
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from vtok_fast import parity
from vtok_fast.dispatch import native
from vtok_fast.dispatch.backends import Reason
from vtok_fast.ops.causal_conv3d import e4m3
from vtok_fast.parity import Parity
from vtok_fast.swap.adapters import (
    cosmos,
    diffusers_cogvideox,
    diffusers_cosmos,
    diffusers_hunyuan,
    diffusers_hunyuan15,
    diffusers_kl,
    diffusers_ltx,
    diffusers_ltx2,
    diffusers_mochi,
    diffusers_qwenimage,
    diffusers_vidtok,
    diffusers_wan,
    infotok,
    norms,
    pad_conv,
    promag,
    vector_quantize,
    vidtok,
)
from vtok_fast.swap.branches import executed
from vtok_fast.swap.flow import followed
from vtok_fast.swap.guard import by_whom, is_replaced
from vtok_fast.swap.layout import Place
from vtok_fast.swap.live_memory import peak_bytes
from vtok_fast.swap.patch import EVERYTHING, Calls, Patch, Skip, Swap, described, why_hooked
from vtok_fast.swap.pipeline import of_pipeline
from vtok_fast.swap.record import Entry
from vtok_fast.swap.report import Report
from vtok_fast.swap.results import Incomparable, close, equal, psnr
from vtok_fast.swap.results import fast as fast_contract
from vtok_fast.swap.watch import is_swapped
from vtok_fast.swap.whole import costs


class Adapter(Protocol):
    """What a module of ``adapters/`` owes. Two more things it may have:

    ``quantizers(model)``, a list of (module, levels): the FSQ quantizers whose inputs are latents themselves.
    Their tokens are judged on an example.

    ``NETWORKS``, the name of the last layer by the class, or the class name, of a network in which no code of
    the library looks at the strides of a video. Within it videos stay channels-last. ``LIBRARY``, the module
    of classes that are given by name, or several.
    """

    def propose(self, module: nn.Module) -> list[Swap] | Skip | None:
        """The swaps of a module; a ``Skip`` for one that is known and left alone; None for an unknown one."""
        ...


# Asked in this order; the first that knows a module answers for it.
LIBRARIES: tuple[Adapter, ...] = (
    diffusers_wan,
    diffusers_qwenimage,
    diffusers_cogvideox,
    diffusers_hunyuan,
    diffusers_hunyuan15,
    diffusers_mochi,
    diffusers_cosmos,
    diffusers_vidtok,
    diffusers_ltx,
    diffusers_ltx2,
    diffusers_kl,
    vector_quantize,
)
ADAPTERS: tuple[Adapter, ...] = (vidtok, cosmos, infotok, promag, *LIBRARIES, norms, pad_conv)

_cache_shares: dict[int, int] = {}  # accelerated model -> bytes of the weight cache it pays for


def accelerate(model: Any, *, example: Any = None, check: bool = True, contract: str = "close") -> Report:
    """Swaps the ops into ``model``, in place, and reports what was done.

    No module is replaced: single methods of single instances are, so classes, parameters, ``state_dict``
    keys, hooks on untouched modules and references to the modules stay what they are. ``report.revert()``
    gives the model back. A module that is already accelerated is left as it is.

    Args:
        model: any module, or a pipeline of diffusers, whose ``vae`` it then is. Modules whose kind no adapter
            knows are left alone and named in the report.
        example: the model's input, a tensor or a tuple of arguments. With it every swap is checked on the
            inputs that it gets there, and the whole model end to end; without, on small random inputs of its
            own.
        check: measure each swap against its contract and undo one that fails; with ``example`` also those
            with the largest errors, as long as the whole model is beyond its contract.
        contract: "close" may replace arithmetic; "exact" allows only what is bit-equal to the eager chain;
            "fast" also rounds what convolutions multiply to e4m3 on a Hopper GPU, and on a CPU simulates it,
            in modules that stay within `vtok_fast.parity.FAST` of float64. The others are as under "close".
            With ``example`` the scales come from it; without, from each input.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, nor a pipeline with a ``vae``.
        ValueError: ``contract`` is unknown.
        Exception: whatever the model raises on ``example``; the model is then as it was.

    A module that cannot be measured (its weights are on the meta device, sharded or quantized, it cannot be
    copied or run in float64, its result holds no tensors) is left alone with that reason. Under a dispatch
    mode, such as that of fake tensors, nothing is measured, as with ``check=False``; `Report.notes` says so.
    """
    model, notes = of_pipeline(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if contract not in parity.CONTRACTS:
        raise ValueError(f"contract: expected one of {', '.join(parity.CONTRACTS)}, got {contract!r}")
    report = Report(contract, type(model).__name__)
    report.notes += notes
    if check and _is_simulated():
        report.notes.append(
            "Nothing was measured: a dispatch mode is active (fake tensors, for example), under which "
            "operations do not run."
        )
        check, example = False, None
    arguments = None if example is None else example if isinstance(example, tuple) else (example,)
    try:
        candidates = _propose(model, report, sharded=not check)
        measured: dict[_Candidate, _Measurement | str] = {}
        whole: _Whole | None = None
        if check and arguments is None:
            measured = {c: _measure(c, _sample(c), {}, contract) for c in candidates if c.swap.sample}
        elif check and arguments is not None:
            measured, whole = _measure_on_example(model, arguments, candidates, report)
        for c in candidates:
            _install(c, measured.get(c), report, check)
        if contract == "fast":
            _calibrate(model, arguments, report)
        if report._patches:
            report._on_revert.append(_share_weight_cache(model))
        if check and arguments is not None and report._patches:
            _let_flow(model, arguments, report)
        if arguments is not None and whole is not None and report._patches:
            _measure_end_to_end(model, arguments, whole, report)
        for patch in report._patches:
            patch.prime()
    except BaseException:
        report.revert()
        raise
    return report


def _is_simulated() -> bool:
    """Whether what runs now is a dispatch mode's and not PyTorch's: the copies, timings and bytes that a
    measurement takes would be of its making."""
    return (
        torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


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
    place: Place


@dataclass(frozen=True)
class _Cost:
    ms: float
    bytes: int


@dataclass(frozen=True)
class _Measurement:
    """``narrow``: of the swap with operands of e4m3, where it has such."""

    parity: parity.Parity
    eager: _Cost
    fast: _Cost
    narrow: tuple[Parity, _Cost] | None = None

    def rounded(self) -> bool:
        """Whether rounding to e4m3 keeps to the contract *fast*."""
        return self.narrow is not None and self.narrow[0].ok


def _propose(model: nn.Module, report: Report, *, sharded: bool) -> list[_Candidate]:
    """What the adapters would swap, in the model's order; what stays goes into the report with its reason.
    ``sharded``: whether a module whose weights are sharded at present may be swapped."""
    candidates: list[_Candidate] = []
    covered: set[nn.Module] = set()
    places: dict[nn.Module, Place] = {}
    for path, module in model.named_modules():
        last = _last_layer(module)
        foreign = None if last is None else _why_foreign(module)
        if last is not None and foreign is None:
            edge = set(getattr(module, last).modules())
            places |= {m: Place.EDGE if m in edge else Place.INSIDE for m in module.modules()}
            places[module] = Place.NETWORK
        if module in covered:
            continue
        answer = _ask(module)
        why = answer.why if isinstance(answer, Skip) else ""
        swaps = answer if isinstance(answer, list) else []
        if swaps and report.contract == "exact":
            swaps = [
                replace(swap, what=swap.exact_what, function=swap.exact, judge=equal)
                for swap in swaps
                if swap.exact is not None and swap.exact_where(module)
            ]
            why = "" if swaps else "the swap replaces arithmetic, which the contract exact does not allow"
        if foreign is not None and [swap.attribute for swap in swaps] == ["forward"]:
            why, swaps = foreign, []
        if reason := next(filter(None, (_why_replaced(module, swap.attribute) for swap in swaps)), None):
            why, swaps = reason, []
            covered.update(module.modules())
        for swap in swaps:
            if reason := why_hooked(module, swap.covers, swap.attribute, sharded=sharded):
                why, swaps = reason, []
                break
            parts = [module] if swap.covers is None else [module.get_submodule(name) for name in swap.covers]
            covered.update(m for part in parts for m in part.modules())
        for swap in swaps:
            place = places.get(module, Place.ANYWHERE)
            if report.contract == "exact":
                place = Place.UNCHANGED
            elif last is not None and swap.attribute != "forward":
                place = Place.INSIDE if swap.inner and foreign is None else Place.EDGE
            candidates.append(_Candidate(path, module, swap, place))
        if (
            places.get(module) is Place.NETWORK
            and report.contract != "exact"
            and not is_replaced(module, "forward")
            and all(swap.attribute != "forward" for swap in swaps)
        ):
            candidates.append(_Candidate(path, module, _OWN, Place.NETWORK))
        if not swaps and (why or _computes(module)):
            report.skipped.append(
                Entry(path, type(module).__name__, why=why or "no adapter knows this kind of module")
            )
    swapped = {c.module for c in candidates if c.swap.what}
    return [c for c in candidates if c.swap.what or not swapped.isdisjoint(c.module.modules())]


def _own_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(module).forward(module, *args, **kwargs)


# A network as it is; but its result gets the layout that it would have without the swaps inside.
_OWN = Swap("", _own_forward, covers=(), state=EVERYTHING)


def _ask(module: nn.Module) -> list[Swap] | Skip | None:
    """The first adapter's answer; one that cannot read the module leaves it alone."""
    for adapter in ADAPTERS:
        try:
            answer = adapter.propose(module)
        except Exception as error:
            return Skip(f"its adapter could not read it: {described(error)}")
        if answer is not None:
            return answer
    return None


def _why_replaced(module: nn.Module, attribute: str) -> Reason:
    """Why a method is not the class's own, which a swap would take the place of."""
    if not is_replaced(module, attribute):
        return None
    if is_swapped(module.__dict__[attribute]):
        return "already accelerated"
    return f"its {attribute} was replaced{by_whom(module)}"


def _last_layer(module: nn.Module) -> str | None:
    """The name of the last layer of a network in which no code of the library looks at strides."""
    kind = type(module)
    for adapter in ADAPTERS:
        networks = getattr(adapter, "NETWORKS", {})
        if kind in networks:
            return networks[kind]
        library = getattr(adapter, "LIBRARY", ())
        if (
            kind.__module__ in ((library,) if isinstance(library, str) else library)
            and kind.__name__ in networks
        ):
            return networks[kind.__name__]
    return None


def _why_foreign(network: nn.Module) -> Reason:
    """What was put into a network and may look at strides."""
    for path, part in network.named_modules():
        if part is not network and (part._forward_hooks or part._forward_pre_hooks):
            return f"{path} inside has hooks, which may look at strides"
        if type(part).__module__.partition(".")[0] not in ("torch", "diffusers", "vtok_fast"):
            return f"{path} inside is a {type(part).__name__}, which may look at strides"
    return None


def _computes(module: nn.Module) -> bool:
    """Whether a module does something by itself, so that leaving it alone is worth a line."""
    return not list(module.children()) and not isinstance(
        module, (nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict)
    )


def _install(c: _Candidate, measured: _Measurement | str | None, report: Report, check: bool) -> None:
    if not c.swap.what:
        report._patches.append(Patch(c.module, c.swap, Calls(warned=["not here"]), c.place))
        report._patches[-1].install()
        return
    contract = "close" if report.contract == "fast" and check else report.contract
    entry = Entry(c.path, type(c.module).__name__, c.swap.what, contract=contract)
    if isinstance(measured, str):
        report.skipped.append(replace(entry, why=measured))
        return
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
            differ=getattr(measured.parity, "differ", 0),
        )
        if not measured.parity.ok:
            report.skipped.append(replace(entry, why=f"failed its contract: {measured.parity}"))
            return
        if measured.narrow is not None:
            entry = _with_narrow(entry, *measured.narrow)
    patch = Patch(c.module, c.swap, report._calls_of(c.path), c.place)
    if report.contract == "fast":
        rounds = not check or (measured is not None and measured.rounded())
        patch.switch.scales = e4m3.Scales() if rounds else e4m3.OFF
    patch.install()
    report._patches.append(patch)
    report.swapped.append(entry)


def _with_narrow(entry: Entry, judged: parity.Parity, cost: _Cost) -> Entry:
    """What stands in the report of a module whose convolutions were rounded to e4m3 for the check."""
    if not judged.ok:
        return replace(entry, note=f"not rounded to e4m3, which is beyond its contract: {judged}")
    return replace(
        entry,
        contract="fast",
        what=f"{entry.what}, operands of e4m3",
        error=judged.error,
        bound=judged.bound,
        fast_ms=cost.ms,
        fast_bytes=cost.bytes,
        note=f"error before rounding to e4m3: {entry.error:.1e}",
    )


def _calibrate(model: nn.Module, args: tuple | None, report: Report) -> None:
    """Records on the example the scales of all convolutions that are to be rounded to e4m3; and notes where
    nothing is rounded, or not by a GPU."""
    if not any(e.contract == "fast" for e in report.swapped):
        report.notes.append(
            "Nothing is rounded to e4m3: no swapped module has a convolution that can be rounded and keeps "
            "to its contract with it, or the GPU is not a Hopper."
        )
        return
    if not any(t.is_cuda for t in (*model.parameters(), *model.buffers())):
        report.notes.append(
            "There is no GPU here: rounding to e4m3 is simulated, which shows its error and takes longer."
        )
    if args is None:
        return
    scales = [s for p in report._patches if (s := p.switch.scales) is not None and s is not e4m3.OFF]
    for each in scales:
        each.recording = True
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for each in scales:
            each.recording = False


# ---- checks ------------------------------------------------------------------------------------------------


def _measure(c: _Candidate, args: tuple | str, kwargs: dict[str, Any], contract: str) -> _Measurement | str:
    """Runs a copy of the module as it is, in float64, and swapped; or says why that is not possible. The
    module itself is not touched."""
    if isinstance(args, str):
        return args
    step = "copying it"
    try:
        with torch.no_grad():
            probe = copy.deepcopy(_without_hooks(c.swap.probe(c.module))).eval()
            probe.__dict__.pop(c.swap.attribute, None)
            step = "running a copy"
            eager, eager_cost = _measured(getattr(probe, c.swap.attribute), args, kwargs)
            step = "running a copy in float64"
            if c.swap.reference is not None:
                ref64 = c.swap.reference(probe, *args, **kwargs), None
            else:
                double = copy.deepcopy(probe).double()
                ref64 = _call(getattr(double, c.swap.attribute), _to_double(args), _to_double(kwargs))
                del double
            step = "running the swap"
            patch = Patch(probe, c.swap, Calls(c.path, warned=["not here"]))
            patch.install()
            fast, fast_cost = _measured(getattr(probe, c.swap.attribute), args, kwargs)
            narrow = _measure_narrow(patch, args, kwargs) if contract == "fast" else None
        if patch.calls.bypassed:
            return f"the class's own method takes the call: {patch.calls.why}"
        step = "comparing the results"
        if c.swap.judge is not None:
            judged = c.swap.judge(fast[0], eager[0], ref64[0])
        else:
            judged = close(fast, eager, ref64)
        if narrow is not None:
            narrow = fast_contract(narrow[0], ref64), narrow[1]
    except Exception as error:
        return f"cannot be measured: {step} raised {described(error)}"
    return _Measurement(judged, eager_cost, fast_cost, narrow)


def _measure_narrow(patch: Patch, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, _Cost] | None:
    """The swap's result with operands of e4m3, scaled by these inputs, and its cost; None where it multiplies
    nothing that is rounded."""
    patch.switch.scales = scales = e4m3.Scales()
    method = getattr(patch.module, patch.swap.attribute)
    _call(method, args, kwargs)
    found = _measured(method, args, kwargs) if scales.ran else None
    patch.switch.scales = None
    return found


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
    """What `_call` gives; the shortest of three to seven runs in milliseconds, and the most memory that its
    tensors took."""
    best, began = float("inf"), time.perf_counter()
    for done in range(7):
        if done >= 3 and time.perf_counter() - began > 0.02:
            break
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
        if value.is_complex():
            return value.to(torch.complex128)
        return value.double() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_to_double(v) for v in value)
    if type(value) is dict:
        return {k: _to_double(v) for k, v in value.items()}
    return value


@dataclass(frozen=True)
class _Whole:
    """What a model gives on an example: its result and its quantizers' latents, as it is and in float64."""

    eager: tuple
    ref64: tuple


def _measure_on_example(
    model: nn.Module, args: tuple, candidates: list[_Candidate], report: Report
) -> tuple[dict, _Whole | None]:
    """Measures each candidate on the first inputs that it gets, while the model runs as it is; also the
    model's own result, or None where there is no float64 to judge it by."""
    measured: dict[_Candidate, _Measurement | str] = {}
    handles = []
    for c in candidates:
        if c.swap.sample is None:
            continue
        if c.swap.attribute != "forward":  # no hook sees such a call
            measured[c] = _measure(c, _sample(c), {}, report.contract)
            continue

        def hook(module: nn.Module, args: tuple, kwargs: dict, c: _Candidate = c) -> None:
            if c not in measured:
                measured[c] = _measure(c, args, kwargs, report.contract)

        handles.append(c.module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        eager = _run(model, args)
    finally:
        for handle in handles:
            handle.remove()
    try:
        return measured, _Whole(eager, _run(copy.deepcopy(model).double(), _to_double(args)))
    except Exception as error:
        report.notes.append(f"not measured end to end: a float64 copy of the model raised {described(error)}")
        return measured, None


def _sample(c: _Candidate) -> tuple | str:
    """The candidate's random arguments, the same every time and without touching the program's random
    numbers; or why there are none."""
    if c.swap.sample is None:
        return ()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return c.swap.sample(c.module)
    except Exception as error:
        return f"cannot be measured: making an input for it raised {described(error)}"


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
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(clone, name, type(getattr(module, name))())
    return clone


def _let_flow(model: nn.Module, args: tuple, report: Report) -> None:
    """Lets results stay channels-last where nothing looked at their strides on the example."""
    for patch in report._patches:
        patch.switch.hands_on, patch.switch.fed_by = False, ()
    try:
        with torch.no_grad(), followed(report._patches) as flow, executed() as code:
            result = model(*args)
        unread = flow.unread(result)
    except Exception as error:  # code that cannot be followed keeps PyTorch's layout
        report._note(f"the layout of results was not followed: {described(error)}")
        return
    if branching := code.branching() if unread else None:
        report._note(
            f"Results keep PyTorch's layout: {branching} tests something, so another call may read them."
        )
        return
    for patch in flow.fed_by(unread):
        patch.switch.fed_by = [maker.switch for maker in unread]
    for patch in unread:
        patch.switch.hands_on = True


def _measure_end_to_end(model: nn.Module, args: tuple, whole: _Whole, report: Report) -> None:
    """Judges the whole model. While it is beyond its contract, swaps are taken out, those with the largest
    errors first, one, then two, then four: the model is within its contract at the end, unless it was not
    by itself, as where float16 overflows and float64 does not."""
    share = 1
    while True:
        try:
            fast = _run(model, args)
        except Exception as error:  # it ran as it was
            why = f"with the swaps the model raised {described(error)} on the example"
            report._take_out(lambda calls: why)  # noqa: B023  # called at once
            return
        report._take_out(
            lambda calls: f"the class's own method takes the calls: {calls.why}" if calls.unused else None
        )
        try:
            p = _judged(fast, whole, report)
        except Exception as error:
            why = str(error) if isinstance(error, (Incomparable, ValueError)) else described(error)
            report.notes.append(f"not measured end to end: {why}")
            return
        report.tokens = [
            parity.tokens(z, z_eager, z64, levels)
            for (z, levels), (z_eager, _), (z64, _) in zip(fast[1], whole.eager[1], whole.ref64[1])
        ]
        if p.ok or p.contract == "fast" or report.flips or not report.swapped:
            break
        if not close(whole.eager[0], whole.eager[0], whole.ref64[0]).ok:
            break
        worst = sorted(report.swapped, key=lambda entry: entry.error or 0.0, reverse=True)
        report._take_back([entry.path for entry in worst[:share]], p)
        share *= 2
        if report._patches:
            _let_flow(model, args, report)
    report.end_to_end = Entry(
        "",
        type(model).__name__,
        "end to end",
        "" if p.ok or p.contract == "fast" else f"beyond its contract: {p}",
        p.contract,
        p.error,
        None if p.contract == "fast" else p.bound,  # rounding adds up along a model, by no rule
        *costs(lambda: model(*args), report._patches, _wait_for_gpu),
    )


def _judged(result: tuple, whole: _Whole, report: Report) -> Parity:
    """The whole model's result against its contract."""
    if any(e.contract == "fast" for e in report.swapped):
        report.psnr = psnr(result[0], whole.ref64[0])
        return fast_contract(result[0], whole.ref64[0])
    errors = [entry.error for entry in report.swapped if entry.error is not None]
    return close(result[0], whole.eager[0], whole.ref64[0], inside=math.hypot(*errors))


# ---- the cache of transformed weights ----------------------------------------------------------------------


def _share_weight_cache(model: nn.Module) -> Any:
    """Grants the native weight cache this model's own bytes, or what VTOK_FAST_WEIGHT_CACHE says; returns how
    to take them back."""
    key = id(model)
    own = sum(p.numel() * p.element_size() for p in model.parameters() if not is_lazy(p))
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
