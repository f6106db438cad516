"""What can run an op here, who is chosen, and why not the others.

An op holds its backends in order of preference, each with a ``why_not(call)`` that returns None for yes and
the reason for no. Automatic choice takes the first that can run the call and records why others could not
(`fallbacks`); ``backend=`` at a call raises `BackendError` instead. ``with
backend("reference"):`` and the environment variable ``VTOK_FAST_BACKEND``, read at
import, set a preference for a block or a program: an op without that backend, or whose call it cannot run,
falls back and records why.

A gradient is an op of its own, ``<op>_backward``. It runs later, often in another thread, so the forward pass
records the caller's choice with `remember`, and the backward pass selects under it.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from vtok_fast.dispatch import tuning

NAMES = ("sm90", "sm80", "triton", "cpu", "reference")
OLDEST_GPU = 80  # compute capability: before it, products of half precision take minutes to compile
ALGORITHMS = ("auto", "direct", "winograd2", "winograd4")

Reason = str | None  # what stands against something, as the middle of a sentence; None where nothing does

_local = threading.local()
_ops: dict[str, tuple[Backend, ...]] = {}
_fallbacks: dict[tuple[str, str], str] = {}


class BackendError(RuntimeError):
    """An explicitly named backend cannot run this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op: ``why_not(call)`` gives None or the reason against it, ``run(call)`` does it.

    ``why_slower(call)``, consulted only by automatic selection, gives a reason where another backend was
    measured to be faster.
    ``needs_native``: whether a ``cpu`` backend is made of the native module's kernels.
    """

    name: str
    why_not: Callable[[Any], Reason]
    run: Callable[..., Any]
    why_slower: Callable[[Any], Reason] = lambda call: None
    needs_native: bool = True


def register(op: str, *backends: Backend) -> None:
    """Makes an op's backends known, in order of preference. The reference comes last and can run
    everything."""
    _ops[op] = backends


@functools.lru_cache(maxsize=256)
def _or_else(op: str, wanted: Backend, last: Backend) -> Backend:
    """Runs the call; where a GPU has less shared memory or fewer registers than a kernel takes, warns and
    runs ``last``. Nothing of the call has happened by then: Triton refuses before a launch."""

    def run(call: Any, *args: Any) -> Any:
        try:
            return wanted.run(call, *args)
        except Exception as error:
            if type(error).__name__ != "OutOfResources" or args or tuning._watch is not None:
                raise
            _fallbacks[op, wanted.name] = f"this GPU has not what a kernel takes ({error})"
            warnings.warn(
                f"{op}: {_fallbacks[op, wanted.name]}; PyTorch runs it", RuntimeWarning, stacklevel=2
            )
        return last.run(call)

    return replace(wanted, run=run)


def _checked(kind: str, name: str | None, known: tuple[str, ...]) -> str | None:
    if name is not None and name not in known:
        raise ValueError(f"{kind}: expected one of {', '.join(known)}, got {name!r}")
    return name


# Read once: a look into the environment costs as much as the checks of a small call.
_environment_backend = _checked("VTOK_FAST_BACKEND", os.environ.get("VTOK_FAST_BACKEND") or None, NAMES)
_environment_algorithm = _checked(
    "VTOK_FAST_CONV_ALGORITHM", os.environ.get("VTOK_FAST_CONV_ALGORITHM") or None, ALGORITHMS
)


@contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Prefers one backend for every op within the block (this thread only); None returns to automatic
    choice."""
    previous = getattr(_local, "backend", None)
    _local.backend = _checked("backend", name, NAMES) or "auto"
    try:
        yield
    finally:
        _local.backend = previous


@contextmanager
def algorithm(name: str) -> Iterator[None]:
    """Fixes the CPU convolution's algorithm within the block: ``auto``, ``direct``, ``winograd2`` or
    ``winograd4``.

    A convolution that is not a 3x3 plane at stride 1 is direct whatever the name.
    """
    previous = getattr(_local, "algorithm", None)
    _local.algorithm = _checked("algorithm", name, ALGORITHMS)
    try:
        yield
    finally:
        _local.algorithm = previous


def current_algorithm() -> str:
    """The algorithm chosen by `algorithm`, else by ``VTOK_FAST_CONV_ALGORITHM`` at import, else
    ``auto``."""
    return getattr(_local, "algorithm", None) or _environment_algorithm or "auto"


def preferred() -> str | None:
    """The backend preferred by `backend` or the environment, or None for automatic choice."""
    name = getattr(_local, "backend", None) or _environment_backend
    return None if name == "auto" else name


def _preferred_in_eager() -> str | None:
    """The same, in a tenth of the time; torch.compile does not guard a look into this dict."""
    name = _local.__dict__.get("backend") or _environment_backend
    return None if name == "auto" else name


def remember(ctx: Any, explicit: str | None) -> None:
    """Records in an autograd context what the caller of the forward pass chose: at the call, by
    `backend`, by `algorithm` or in the environment. The gradient prefers that backend, and falls
    back where it cannot run."""
    ctx.explicit_backend = explicit
    ctx.surrounding_backend = preferred()
    ctx.preferred_backend = explicit or ctx.surrounding_backend
    ctx.algorithm = current_algorithm()


@contextmanager
def remembered(ctx: Any) -> Iterator[None]:
    """Within the block, the choice that `remember` recorded is the preference of this thread."""
    with backend(ctx.preferred_backend), algorithm(ctx.algorithm):
        yield


def saved_tensors(ctx: Any) -> tuple[Any, ...]:
    """The tensors that the forward pass saved. Activation checkpointing computes them again at this moment:
    other calls too, so under what surrounded this call and not under its own ``backend=``."""
    with backend(ctx.surrounding_backend), algorithm(ctx.algorithm):
        return tuple(ctx.saved_tensors)  # read once: each reading may compute them again


def is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is being computed that will be differentiated in its turn (``create_graph=True``).
    Kernels leave no graph behind, so the definition in PyTorch computes it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def select(op: str, call: Any, explicit: str | None = None) -> Backend:
    """The backend that runs this call.

    Raises:
        ValueError: ``explicit`` is not a backend's name.
        BackendError: the op has no such backend, or it cannot run this call.
    """
    candidates = _ops[op]
    if explicit is not None:
        _checked("backend", explicit, NAMES)
        for candidate in candidates:
            if candidate.name == explicit:
                if reason := candidate.why_not(call):
                    raise BackendError(f"{op}: backend={explicit!r} cannot run this call: {reason}")
                return candidate
        have = ", ".join(b.name for b in candidates)
        raise BackendError(f"{op}: backend={explicit!r} does not exist for this op; it has {have}")
    wanted = _preferred_in_eager()
    if wanted is not None:
        candidates = tuple(sorted(candidates, key=lambda b: b.name != wanted))
        if candidates[0].name != wanted:
            _fallbacks[op, wanted] = "this op has no such backend"
    for candidate in candidates:
        reason = candidate.why_not(call)
        if reason is None and candidate.name != wanted:
            reason = candidate.why_slower(call)
        if reason is None:
            return candidate if candidate.name != "triton" else _or_else(op, candidate, _ops[op][-1])
        _fallbacks[op, candidate.name] = reason
    raise BackendError(f"{op}: no backend can run this call: {reason}")


def insist_on_reference(op: str, explicit: str | None) -> None:
    """Where only the definition in PyTorch can run.

    Raises:
        ValueError: ``explicit`` is not a backend's name.
        BackendError: ``explicit`` is another backend.
    """
    if _checked("backend", explicit, NAMES) not in (None, "reference"):
        raise BackendError(f"{op}: backend={explicit!r} cannot run this call: torch.func differentiates it")


def is_only_reference(op: str, call: Any) -> bool:
    """Whether no other backend than the reference can run this call, so that there is nothing to choose."""
    return all(b.name == "reference" or b.why_not(call) is not None for b in _ops[op])


def fallbacks() -> dict[str, dict[str, str]]:
    """Per op and backend, the latest reason for which automatic choice passed it over."""
    result: dict[str, dict[str, str]] = {}
    for (op, name), reason in _fallbacks.items():
        result.setdefault(op, {})[name] = reason
    return result


@functools.cache
def why_no_triton() -> Reason:
    """Why Triton cannot be imported here, or None where it can. Its kernels are imported at their first call
    only."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return None


def backends_of_ops() -> dict[str, tuple[Backend, ...]]:
    """Every registered op with its backends, in order of preference."""
    return dict(_ops)


@functools.cache
def gpu_of(device: torch.device) -> int | str:
    """What a Triton kernel is compiled for: the compute capability of an NVIDIA GPU, such as 90; "hip" for
    AMD's, which torch numbers likewise, but whose tiles are others."""
    if torch.version.hip is not None:
        return "hip"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def why_not_triton_on(tensor: torch.Tensor) -> Reason:
    """Why a Triton kernel cannot take this tensor, or None where it can: a GPU that Triton compiles for."""
    if tensor.device.type != "cuda":
        return f"the tensors are on {tensor.device}"
    gpu = gpu_of(tensor.device)
    if not isinstance(gpu, str) and gpu < OLDEST_GPU:
        return (
            f"{tensor.device} has compute capability {gpu // 10}.{gpu % 10}, and these kernels are made for "
            f"{OLDEST_GPU // 10}.{OLDEST_GPU % 10} or later"
        )
    return why_no_triton()
