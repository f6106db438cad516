"""When frames are shown: their own times, kept exactly, and resampling to a constant rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import Any, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Times:
    """The time of each frame, in multiples of `base` seconds.

    Attributes:
        base: seconds, a fraction.
        pts: of each frame, increasing.
        end: when the last one ends.
    """

    base: Fraction
    pts: tuple[int, ...]
    end: int

    def __post_init__(self) -> None:
        steps = self.steps
        if self.base <= 0 or (steps and min(steps) < 1):
            raise ValueError(f"times: must increase, and base be positive; got base {self.base}")

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def steps(self) -> list[int]:
        """How long each frame is shown, in multiples of base."""
        return [after - before for before, after in zip(self.pts, (*self.pts[1:], self.end))]

    @property
    def seconds(self) -> list[float]:
        """The time of each frame."""
        return [float(pts * self.base) for pts in self.pts]

    @property
    def durations(self) -> list[float]:
        """How long each frame is shown, in seconds."""
        return [float(step * self.base) for step in self.steps]

    @property
    def rate(self) -> Fraction:
        """Frames per second, on average: how many there are over how long they last."""
        return len(self.pts) / ((self.end - self.pts[0]) * self.base)

    @classmethod
    def constant(cls, fps: float | Fraction, count: int, start: int = 0) -> Times:
        """`count` frames at a constant rate, from frame number `start` on."""
        rate = Fraction(fps).limit_denominator(1_000_000)
        if rate <= 0:  # one frame in weeks
            rate = Fraction(fps)
        return cls(1 / rate, tuple(range(start, start + count)), start + count)

    def __getitem__(self, frames: slice) -> Times:
        """Those of some consecutive frames."""
        first, last, _ = frames.indices(len(self.pts))
        end = self.end if last >= len(self.pts) else self.pts[last]
        return Times(self.base, self.pts[first:last], end)

    def from_zero(self) -> Times:
        """The same, beginning at 0."""
        first = self.pts[0]
        return Times(self.base, tuple(pts - first for pts in self.pts), self.end - first)

    def to_base(self, base: Fraction) -> Times:
        """In other units, rounded; no frame shorter than one of them."""
        pts: list[int] = []
        for value in (*self.pts, self.end):
            exact = value * self.base / base
            pts.append(round(exact) if not pts else max(round(exact), pts[-1] + 1))
        return Times(base, tuple(pts[:-1]), pts[-1])

    @staticmethod
    def cat(parts: Sequence[Times]) -> Times:
        """Those of clips that follow one another. Raises ValueError if one begins before the last frame of
        the one before."""
        if any(part.base != parts[0].base for part in parts):
            raise ValueError("times: the parts have different time bases")
        return Times(parts[0].base, tuple(pts for part in parts for pts in part.pts), parts[-1].end)

    def to_json(self) -> dict[str, Any]:
        """{"base": [numerator, denominator], "start": first, "steps": [[step, how often], ...]}"""
        runs = [[step, len(list(run))] for step, run in groupby(self.steps)]
        start = self.pts[0] if self.pts else self.end
        return {"base": [self.base.numerator, self.base.denominator], "start": start, "steps": runs}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Times:
        """What `to_json` gave. Raises KeyError, TypeError or ValueError for something else."""
        pts: list[int] = []
        now = int(value["start"])
        for step, count in value["steps"]:
            pts += range(now, now + int(step) * int(count), int(step))
            now += int(step) * int(count)
        return cls(Fraction(*value["base"]), tuple(pts), now)


def near(value: Fraction) -> int:
    """To the nearest whole number, halves away from zero."""
    whole = int(abs(value) + Fraction(1, 2))
    return whole if value >= 0 else -whole


def resample(
    items: Iterable[tuple[Item, int, int]], base: Fraction, fps: Fraction
) -> Iterator[tuple[Item, int]]:
    """(item, time, duration) in multiples of base, at a constant rate: (item, number of the frame).

    As ffmpeg's filter "fps" does with round=near: times are rounded to the nearest number of a frame, halves
    away from zero; a number shows the last item at or before it; the last item is shown until its end,
    rounded.
    """
    held: Item | None = None
    number: int | None = None  # of the next frame to give
    end = 0
    for item, pts, duration in items:
        start, end = near(pts * base * fps), near((pts + duration) * base * fps)
        if number is None:
            number = first = start
        else:
            while number < start:
                assert held is not None
                yield held, number
                number += 1
        held = item
    if number is not None and held is not None:
        for last in range(number, max(end, first + 1)):
            yield held, last
