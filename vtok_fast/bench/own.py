"""A workload of the user's own: the shapes given on the command line, for the op that is named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Own:
    """What the options of ``vtok-fast bench`` say; each op takes what it needs and refuses what it does not
    know.

    ``shape``: the input's, (B, C, T, H, W), for scope_attention (B, heads, tokens, head size). ``numbers``:
        those of a scope.
    """

    shape: tuple[int, ...] | None = None
    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] | None = None
    channels: int | None = None
    time_mode: str | None = None
    kind: str | None = None
    groups: int | None = None
    levels: tuple[int, ...] | None = None
    numbers: tuple[int, ...] | None = None
    compile: bool = False

    def sizes(self, names: str) -> tuple[int, ...]:
        """The shape, which must have one positive number for each of ``names``, such as ``"B,C,T,H,W"``."""
        if self.shape is None:
            raise ValueError(f"shape: expected --shape {names}, got none")
        if len(self.shape) != len(names.split(",")) or min(self.shape) < 1:
            raise ValueError(f"shape={','.join(map(str, self.shape))}: expected {names}, positive numbers")
        return self.shape

    def triple(self, name: str, default: tuple[int, int, int]) -> tuple[int, int, int]:
        """Three positive numbers, for time, height and width."""
        value = getattr(self, name)
        if value is None:
            return default
        if len(value) != 3 or min(value) < 1:
            raise ValueError(
                f"{name}={','.join(map(str, value))}: expected three positive numbers, of time, height and "
                f"width"
            )
        return value

    def one_of(self, name: str, known: tuple[str, ...], default: str) -> str:
        value = getattr(self, name) or default
        if value not in known:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")
        return value

    def only(self, op: str, *names: str) -> None:
        """Refuses options that the op does not have."""
        for name in self.__dataclass_fields__:
            if name not in ("compile", "shape", *names) and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}={getattr(self, name)}: {op} takes no such option (it takes shape, "
                    f"{', '.join(names)})"
                )


def megabytes(*tensors: Any) -> float:
    """What some tensors (or None) hold, each counted once."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors if t is not None) / 1e6
