"""The whole model's time and memory, as it was and with the swaps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from vtok_fast.swap.live_memory import peak_bytes

if TYPE_CHECKING:
    from vtok_fast.swap.patch import Patch

ROUNDS = 5
ENOUGH = 10.0  # seconds, after which three rounds, and three times that, after which one is enough


@contextmanager
def without(patches: Sequence[Patch]) -> Iterator[None]:
    """The model as it was; its counts of calls stay."""
    for patch in reversed(patches):
        patch.remove()
    try:
        yield
    finally:
        for patch in patches:
            patch.install()


def costs(
    run: Callable[[], Any], patches: Sequence[Patch], wait: Callable[[], None]
) -> tuple[float, float, int, int]:
    """Milliseconds of ``run()`` as it was and with the swaps (medians over rounds in which the two take
    turns), then bytes of its tensors at their highest, likewise. Random numbers of the host are given back.
    """
    counts = [(patch.calls, vars(patch.calls).copy()) for patch in patches]
    times: tuple[list[float], list[float]] = ([], [])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        began = time.perf_counter()
        for done in range(1, ROUNDS + 1):
            with without(patches):
                times[0].append(_ms(run, wait))
            times[1].append(_ms(run, wait))
            spent = time.perf_counter() - began
            if spent > 3 * ENOUGH or spent > ENOUGH and done >= 3:
                break
        with without(patches):
            eager_bytes = peak_bytes(run)
        fast_bytes = peak_bytes(run)
    for calls, before in counts:
        vars(calls).update(before)
    return median(times[0]), median(times[1]), eager_bytes, fast_bytes


def _ms(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    run()
    wait()
    return (time.perf_counter() - start) * 1e3
