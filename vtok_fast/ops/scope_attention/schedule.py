"""How the blocks of ``scope_attention`` share a GPU: programs of unequal length, started in the order of the
work list, each on the first place that falls free.

The longest block bounds the whole: where one sees far more keys than the others, several programs share its
keys, and their results are added up afterwards, always in the same order.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence

FIXED = 3  # steps of a key block that the beginning and the end of a program last
HALF_STEP = 0.8  # of a step: one over half as many keys, 399 instructions of 509 on 9.0
COMBINING = 4  # steps that a second kernel lasts, which adds up what several programs made of a block
MOST_PARTS = 16  # of a block
LEAST_GAIN = 1.1  # below it, one kernel is enough
MANY = 20_000  # programs, from which on none of them is the longest by much


def makespan(costs: Sequence[float], places: int) -> float:
    """When the last of the programs ends that are started in this order, in the units of ``costs``."""
    free = [0.0] * min(places, len(costs))  # all zero: a heap
    last = 0.0
    for cost in costs:
        end = free[0] + cost
        heapq.heapreplace(free, end)
        last = max(last, end)
    return last


def steps_over(rows: int, step: int, rest: int) -> float:
    """What it costs to walk over a range of so many rows, ``step`` at a time, and what that leaves ``rest``
    at a time."""
    return rows // step + -(-(rows % step) // rest) * (1 if rest == step else HALF_STEP)


def parts_of(steps: float, longest: float) -> int:
    """How many programs share a block of so many steps if none is to have more than ``longest``."""
    return max(1, math.ceil(steps / longest))


def costs(steps: Sequence[float], copies: int, longest: float | None = None) -> list[float]:
    """What each program costs, the longest first. ``steps``: of each block, for one head of one video;
    ``copies``: heads of all videos; ``longest``: the most steps of a program, None for whole blocks."""
    found = []
    for n in steps:
        parts = 1 if longest is None else parts_of(n, longest)
        found += [(n if parts == 1 else math.ceil(n / parts)) + FIXED] * parts * copies
    return sorted(found, reverse=True)


@functools.lru_cache(256)
def longest_part(steps: tuple[float, ...], copies: int, places: int) -> float | None:
    """The most steps that a program should have, or None where whole blocks end as early, or nearly so.
    Scopes of equal blocks, such as those of one training run, are simulated once."""
    if not steps or len(steps) * copies > MANY:
        return None
    top, ideal = max(steps), sum(steps) * copies / places
    if top <= 1.25 * ideal:  # then the order of the list fills the GPU
        return None
    whole = makespan(costs(steps, copies), places)
    best = min(
        (makespan(costs(steps, copies, longest), places) + COMBINING, -longest)
        for longest in {-(-top // parts) for parts in range(2, MOST_PARTS + 1)}
    )
    return -best[1] if whole >= LEAST_GAIN * best[0] else None
