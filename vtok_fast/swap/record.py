"""What is known of a swap of a whole model: an entry for each module, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from vtok_fast.parity import TokenParity
from vtok_fast.swap.patch import Calls


@dataclass(frozen=True)
class Entry:
    """One module. ``error`` and ``bound`` are relative to float64 (see `vtok_fast.parity`), times in
    milliseconds and the most memory that tensors took in bytes, both on the check's inputs; None where
    nothing was measured. ``note`` is what else the check saw; ``differ`` how many tokens are not eager's, as
    is allowed beside a threshold."""

    path: str
    kind: str
    what: str = ""
    why: str = ""
    contract: str = ""
    error: float | None = None
    bound: float | None = None
    eager_ms: float | None = None
    fast_ms: float | None = None
    eager_bytes: int | None = None
    fast_bytes: int | None = None
    note: str = ""
    differ: int = 0


@dataclass(frozen=True)
class Bypassed:
    """Why a swap left calls to the class's own method, at last, and how many."""

    why: str
    count: int


class Record:
    """What `Report` holds; its attributes are described there."""

    def __init__(self, contract: str, model: str = ""):
        self.contract, self.model = contract, model
        self.swapped: list[Entry] = []
        self.skipped: list[Entry] = []
        self.end_to_end: Entry | None = None
        self.psnr: float | None = None
        self.tokens: list[TokenParity] = []
        self.notes: list[str] = []
        self._calls: dict[str, Calls] = {}

    @property
    def flips(self) -> bool:
        """Whether a token fell to the other side of a rounding threshold on the example, as it may: that
        changes many pixels."""
        return any(e.differ for e in self.swapped) or any(tokens.flips for tokens in self.tokens)

    @property
    def bypassed(self) -> dict[str, Bypassed]:
        """The swapped modules whose class's own method ran in the place of the swap since, by path: how
        often, and the latest reason. A hook, an adapter or a cast that was added later is one; a call that
        the swap was not made for is another."""
        return {path: Bypassed(c.why, c.bypassed) for path, c in self._calls.items() if c.bypassed}
