"""How everything here is timed.

The candidates of a trial take turns, A B C A B C ..., so that whatever else the machine does falls on all of them alike. The
result is the median over rounds of the ratio *within* a round; its spread is the interquartile range of those ratios.
"""

from __future__ import annotations

import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# Fresh outputs come from memory that the process already holds: with glibc's defaults every large one is a new mapping, and its
# page faults (up to half of the time of an op) would be measured instead of the op.
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_MMAP_THRESHOLD_": str(1 << 40), "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
             "MALLOC_TOP_PAD_": str(1 << 28)}
SAMPLE_SECONDS = 2e-3  # a sample repeats its call until it lasts so long


@dataclass(frozen=True)
class Settings:
    """How long to measure. A trial ends after ``min_rounds`` and ``min_seconds``, or past ``max_seconds``, but never before
    three rounds."""

    quick: bool = False
    full: bool = False
    min_rounds: int = 9
    min_seconds: float = 2.0
    max_seconds: float = 60.0

    @classmethod
    def of(cls, *, quick: bool = False, full: bool = False, seconds: float | None = None) -> Settings:
        base = cls(quick, full, 3, 0.1, 10.0) if quick else cls(quick, full)
        return base if seconds is None else cls(quick, full, base.min_rounds, seconds, max(base.max_seconds, seconds))


@dataclass(frozen=True)
class Candidate:
    """One way to do a trial's work.

    ``role``: ``ours`` (exactly one), ``variant`` (ours, set up differently), ``eager`` (as the model ships), ``peer``, or
    ``floor`` (no competitor, but a limit, like a plain copy). ``prepare`` runs before each round's sample, untimed.
    """

    name: str
    call: Callable[[], Any]
    role: str = "peer"
    prepare: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Trial:
    """One case: what is compared, what is known about it, and why a peer is absent. ``wrong`` says how ours computes something
    else than the reference, None where it does not; such a trial counts as failed."""

    name: str
    group: str
    candidates: Sequence[Candidate]
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    wrong: str | None = None

    @property
    def ours(self) -> Candidate:
        return next(c for c in self.candidates if c.role == "ours")


def allocator_is_pinned() -> bool:
    return all(os.environ.get(name) == value for name, value in ALLOCATOR.items())


def pin_allocator() -> None:
    """Starts this program again with the allocator pinned; returns where it is already. Linux with glibc; harmless elsewhere."""
    if not allocator_is_pinned() and sys.platform == "linux":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | ALLOCATOR)


def interleave(candidates: Sequence[Candidate], settings: Settings) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per call of each candidate in each round, and page faults per call."""
    repeats = {}
    for c in candidates:  # warm-up: two calls each, the second one tells how often to repeat
        if c.prepare:
            c.prepare()
        c.call()
        start = time.perf_counter()
        c.call()
        repeats[c.name] = max(1, math.ceil(SAMPLE_SECONDS / max(time.perf_counter() - start, 1e-7)))
    seconds: dict[str, list[float]] = {c.name: [] for c in candidates}
    faults = dict.fromkeys(seconds, 0)
    begin, rounds = time.perf_counter(), 0
    while True:
        for c in candidates:
            if c.prepare:
                c.prepare()
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            for _ in range(repeats[c.name]):
                c.call()
            seconds[c.name].append((time.perf_counter() - start) / repeats[c.name])
            faults[c.name] += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        rounds += 1
        elapsed = time.perf_counter() - begin
        enough = rounds >= settings.min_rounds and elapsed >= settings.min_seconds
        if enough or (rounds >= 3 and elapsed >= settings.max_seconds):
            return seconds, {name: n / rounds / repeats[name] for name, n in faults.items()}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else list(values) * 3
    return {"median": median, "q1": q1, "q3": q3}


def ratios(seconds: dict[str, list[float]], subject: str) -> dict[str, dict[str, float]]:
    """How many times faster ``subject`` is than each of the others, by the ratios within each round."""
    return {name: spread([other / own for other, own in zip(times, seconds[subject])])
            for name, times in seconds.items() if name != subject}


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)). Raises ValueError for no values, or one that is not positive."""
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"values: expected positive numbers, got {values}")
    return math.exp(math.fsum(map(math.log, values)) / len(values))


@torch.no_grad()
def measure(trial: Trial, settings: Settings) -> dict[str, Any]:
    """Times a trial. The result is plain JSON: per candidate its times, and per way of ours the ratios to all others."""
    seconds, faults = interleave(trial.candidates, settings)
    times = {c.name: {"role": c.role, **spread(seconds[c.name]), "page_faults": faults[c.name]} for c in trial.candidates}
    rivals = [c.name for c in trial.candidates if c.role in ("eager", "peer")]
    return {
        "case": trial.name, "group": trial.group, "facts": trial.facts, "missing": trial.missing, "wrong": trial.wrong,
        "rounds": len(seconds[trial.ours.name]), "seconds": times, "ours": trial.ours.name,
        "eager": next((c.name for c in trial.candidates if c.role == "eager"), None),
        "best": min(rivals, key=lambda name: times[name]["median"], default=None),
        "ratios": {c.name: ratios(seconds, c.name) for c in trial.candidates if c.role in ("ours", "variant")},
    }


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any] | None, str]:
    """``torch.compile(function)``, already compiled for ``args``; or None and the reason why this machine cannot."""
    torch._dynamo.reset()
    fast = torch.compile(function, dynamic=False, fullgraph=True)
    try:
        with torch.no_grad():
            fast(*args)
    except Exception as error:  # whatever a compiler chain may raise: the peer is then recorded as missing
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error).strip() else type(error).__name__
    return fast, ""
