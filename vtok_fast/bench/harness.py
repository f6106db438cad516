"""How everything here is timed.

The candidates of a trial take turns, A B C A B C ..., so that whatever else the machine does falls on all of
them alike. The result is the median over rounds of the ratio *within* a round; its spread is the
interquartile range of those ratios. What one sample is, on a CPU and on a GPU, is in timers.py.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from vtok_fast.bench import timers
from vtok_fast.dispatch import backends

# Fresh outputs come from memory that the process already holds: with glibc's defaults every large one is a
# new mapping, and its page faults (up to half of the time of an op) would be measured instead of the op.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
SAMPLE_SECONDS = 2e-3  # a sample repeats its call until it lasts so long
MOST_REPEATS = 1 << 14


@dataclass(frozen=True)
class Settings:
    """What to measure on, and how long. A trial ends after ``min_rounds`` and ``min_seconds``, or past
    ``max_seconds``, but never before three rounds. ``dtype`` None: each case's own, which is float32 on a CPU
    and bfloat16 on a GPU. ``compile``: whether ``torch.compile`` and FlexAttention, which take long to start,
    are among the peers.
        ``graphs``: on a GPU also the time of a
    replay as a CUDA graph. ``memory``: on a CPU also the peak memory, in a process of its own (a GPU tells it
    anyway)."""

    quick: bool = False
    full: bool = False
    min_rounds: int = 9
    min_seconds: float = 2.0
    max_seconds: float = 60.0
    device: str = "cpu"
    dtype: torch.dtype | None = None
    compile: bool = True
    graphs: bool = False
    memory: bool = False

    @classmethod
    def of(
        cls,
        *,
        quick: bool = False,
        full: bool = False,
        seconds: float | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        compile: bool = True,
        graphs: bool = False,
        memory: bool = False,
    ) -> Settings:
        if torch.device(device).type == "cuda":  # a GPU does not share its time: fewer seconds do
            rounds, least, most = (5, 0.02, 5.0) if quick else (15, 0.3, 20.0)
        else:
            rounds, least, most = (3, 0.1, 10.0) if quick else (9, 2.0, 60.0)
        least = least if seconds is None else seconds
        return cls(quick, full, rounds, least, max(most, least), device, dtype, compile, graphs, memory)

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def working_dtype(self) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if self.on_gpu else torch.float32)


class Missing(Exception):
    """A case cannot run here, because something that is not part of this package is absent."""


@dataclass(frozen=True)
class Candidate:
    """One way to do a trial's work: ``function(*inputs)``. On a GPU the tensors among ``inputs`` rotate.

    ``role``: ``ours`` (exactly one), ``variant`` (ours, set up differently), ``eager`` (as the model ships),
    ``peer``, or ``floor`` (no competitor, but a limit, like a plain copy). ``prepare`` runs before each
    round's sample, untimed.
    """

    name: str
    function: Callable[..., Any]
    role: str = "peer"
    prepare: Callable[[], Any] | None = None
    inputs: tuple[Any, ...] = ()

    def call(self) -> Any:
        return self.function(*self.inputs)


@dataclass(frozen=True)
class Trial:
    """One case: what is compared, what is known about it, and why a peer is absent. ``wrong`` says how ours
    computes something else than the reference, None where it does not; such a trial counts as failed."""

    name: str
    group: str
    candidates: Sequence[Candidate]
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def done_gflop(self) -> float | None:
        """What ours does of the definition's operations (`vtok_fast.bench.products`)."""
        return self.facts.get("done_gflop", self.facts.get("gflop"))

    @property
    def ours(self) -> Candidate:
        return next(c for c in self.candidates if c.role == "ours")


def allocator_is_pinned() -> bool:
    return all(os.environ.get(name) == value for name, value in ALLOCATOR.items())


def pin_allocator() -> None:
    """Starts this program again with the allocator pinned; returns where it is already. Linux with glibc;
    harmless elsewhere."""
    if not allocator_is_pinned() and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def interleave(
    candidates: Sequence[Candidate], settings: Settings
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Seconds per call of each candidate in each round; and what else its timer tells: page faults per call
    on a CPU, peak memory in bytes, the host's seconds per call and those of a replay as a CUDA graph on a
    GPU."""
    timer = (
        timers.DeviceTimer(settings.device, graphs=settings.graphs) if settings.on_gpu else timers.HostTimer()
    )
    calls, repeats = {}, {}
    for c in candidates:  # warm-up: two calls each, the second one tells how often to repeat
        if c.prepare:
            c.prepare()
        calls[c.name] = timer.calls(c.function, c.inputs)
        c.call()
        repeats[c.name] = min(
            MOST_REPEATS, math.ceil(SAMPLE_SECONDS / max(timer.sample(calls[c.name], 1), 1e-7))
        )
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    timer.reset()
    begin, rounds = time.perf_counter(), 0
    while True:
        for c in candidates:
            if c.prepare:
                c.prepare()
            seconds[c.name].append(timer.sample(calls[c.name], repeats[c.name], c.name))
        rounds += 1
        elapsed = time.perf_counter() - begin
        enough = rounds >= settings.min_rounds and elapsed >= settings.min_seconds
        if enough or (rounds >= 3 and elapsed >= settings.max_seconds):
            return seconds, {c.name: timer.extras(c.name, c.call) for c in candidates}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    )
    return {"median": median, "q1": q1, "q3": q3}


def ratios(seconds: dict[str, list[float]], subject: str) -> dict[str, dict[str, float]]:
    """How many times faster ``subject`` is than each of the others, by the ratios within each round."""
    return {
        name: spread([other / own for other, own in zip(times, seconds[subject])])
        for name, times in seconds.items()
        if name != subject
    }


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)). Raises ValueError for no values, or one that is not positive."""
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"values: expected positive numbers, got {values}")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


def floor_seconds(facts: dict[str, Any], ceilings: dict[str, Any] | None) -> float | None:
    """What the trial takes at the least on this machine: its operations at the rate of a matrix product, or
    its bytes (each input read once, each output written once) at the bandwidth of a copy, whichever is
    longer. None where either is not known.
    """
    if not ceilings or not (facts.get("gflop") or facts.get("megabytes")):
        return None
    rates = ceilings["matmul_tflop_s"]
    compute = (
        facts.get("gflop", 0.0) / 1e3 / rates[facts.get("dtype")] if facts.get("dtype") in rates else 0.0
    )
    return max(compute, facts.get("megabytes", 0.0) / 1e3 / ceilings["copy_gb_s"]) or None


def rates(seconds: float, facts: dict[str, Any], ceilings: dict[str, Any] | None) -> dict[str, float]:
    """TFLOP/s, GB/s, and the share of what the roofline allows, where they are known."""
    found = {}
    if facts.get("gflop"):
        found["tflop_s"] = facts["gflop"] / 1e3 / seconds
    if facts.get("megabytes"):
        found["gb_s"] = facts["megabytes"] / 1e3 / seconds
    floor = floor_seconds(facts, ceilings)
    return found if floor is None else found | {"roofline": floor / seconds}


@torch.no_grad()
def measure(trial: Trial, settings: Settings, ceilings: dict[str, Any] | None = None) -> dict[str, Any]:
    """Times a trial. The result is plain JSON: per candidate its times and rates, and per way of ours the
    ratios to all others."""
    seconds, extras = interleave(trial.candidates, settings)
    times = {c.name: {"role": c.role, **spread(seconds[c.name]), **extras[c.name]} for c in trial.candidates}
    for entry in times.values():
        own = entry["role"] in ("ours", "variant") and trial.done_gflop is not None
        done = {"gflop": trial.done_gflop} if own else {}
        entry |= rates(entry["median"], trial.facts | done, ceilings)
    rivals = [c.name for c in trial.candidates if c.role in ("eager", "peer")]
    return {
        "case": trial.name,
        "group": trial.group,
        "facts": trial.facts,
        "missing": trial.missing,
        "wrong": trial.wrong,
        "rounds": len(seconds[trial.ours.name]),
        "seconds": times,
        "ours": trial.ours.name,
        "eager": next((c.name for c in trial.candidates if c.role == "eager"), None),
        "best": min(rivals, key=lambda name: times[name]["median"], default=None),
        "ratios": {
            c.name: ratios(seconds, c.name) for c in trial.candidates if c.role in ("ours", "variant")
        },
    }


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any] | None, str]:
    """``torch.compile(function)``, already compiled for ``args``; or None and the reason why this machine
    cannot.

    On a GPU with max-autotune, but without the CUDA graphs of that mode: they would copy every input that
    rotates.
    """
    on_gpu = any(isinstance(arg, torch.Tensor) and arg.is_cuda for arg in args)
    torch._dynamo.reset()
    fast = torch.compile(
        function, dynamic=False, fullgraph=True, mode="max-autotune-no-cudagraphs" if on_gpu else None
    )
    try:
        with torch.no_grad():
            fast(*args)
    except Exception as error:  # whatever a compiler chain may raise: the peer is then recorded as missing
        said = str(error).strip()
        return None, f"{type(error).__name__}: {said.splitlines()[0][:200]}" if said else type(error).__name__
    return fast, ""


def with_compiled(
    candidates: Sequence[Candidate], settings: Settings
) -> tuple[list[Candidate], dict[str, str]]:
    """``torch.compile`` of each candidate, and why those that are missing are."""
    found, missing = [], {}
    for of in candidates:
        fast, why = compiled(of.function, *of.inputs) if settings.compile else (None, "not asked for")
        name = f"torch.compile({of.name})"
        if fast is None:
            missing[name] = why
        else:
            found.append(Candidate(name, fast, inputs=of.inputs))
    return found, missing


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def selections(note: Callable[[str, Any, backends.Backend], None]) -> Iterator[None]:
    """Within it, ``note(op, call, backend)`` learns of every choice of a backend."""
    select = backends.select

    def noted(op: str, call: Any, explicit: str | None = None) -> backends.Backend:
        backend = select(op, call, explicit)
        note(op, call, backend)
        return backend

    backends.select = noted
    try:
        yield
    finally:
        backends.select = select


def backend_of(call: Callable[[], Any]) -> str:
    """Runs a call and names the backends that its ops chose."""
    chosen: dict[str, None] = {}
    with selections(lambda op, call, backend: chosen.update({backend.name: None})):
        call()
    return ", ".join(chosen)
