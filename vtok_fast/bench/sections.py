"""The sections of the benchmark: an op or a model each, in vtok_fast/bench/cases."""

from __future__ import annotations

import importlib
from types import ModuleType

from vtok_fast.ops import FOLDERS

OPS = FOLDERS
SECTIONS = (*OPS, "vidtok", "models")


def section(name: str) -> ModuleType:
    """The module of a section. Raises ValueError for an unknown one."""
    if name not in SECTIONS:
        raise ValueError(f"bench: expected one of {', '.join(SECTIONS)}, got {name!r}")
    return importlib.import_module(f"vtok_fast.bench.cases.{name}")
