"""Whether a run of a model shows what every run does: its code has no branch.

An example shows where results go on the path that it takes. Code that tests something (a flag, a size, a
value, how often a loop runs) may take another path later, and what it does there nobody has seen.
"""

from __future__ import annotations

import dis
import functools
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

# PyTorch's functions are judged by their names; those of the standard library read no tensors.
_KNOWN = frozenset(("torch", "vtok_fast")) | sys.stdlib_module_names


class Code:
    """The code of others that ran within `executed`."""

    def __init__(self) -> None:
        self.seen: set[CodeType] = set()

    def branching(self) -> str | None:
        """The name of a function that tests something, or None."""
        return next(
            (getattr(code, "co_qualname", code.co_name) for code in self.seen if _branches(code)), None
        )


@contextmanager
def executed() -> Iterator[Code]:
    """Notes the Python functions that this thread calls within the block, but those of PyTorch and ours."""
    code, before = Code(), sys.getprofile()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if event == "call" and package not in _KNOWN:
            code.seen.add(frame.f_code)

    collects = gc.isenabled()
    gc.disable()  # a collection calls code that is not the model's
    sys.setprofile(profile)
    try:
        yield code
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


@functools.lru_cache(4096)
def _branches(code: CodeType) -> bool:
    """Whether a function tests a condition, loops or catches exceptions."""
    names = {instruction.opname for instruction in dis.get_instructions(code)}
    return any(
        "JUMP" in name and "_IF_" in name or name in ("FOR_ITER", "SETUP_FINALLY", "PUSH_EXC_INFO")
        for name in names
    )
