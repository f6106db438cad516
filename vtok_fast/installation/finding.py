"""What one check of the doctor says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One check. `level`: "ok", "hint" (works, could be better) or "bad"; `cure` says what to do."""

    name: str
    level: str
    text: str
    cure: str = ""
