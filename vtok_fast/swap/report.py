"""What ``accelerate`` did: every module swapped or left alone, with the reason and the measured error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtok_fast.dispatch.backends import Reason
from vtok_fast.io.files import write_atomically
from vtok_fast.parity import Parity
from vtok_fast.swap import report_picture, summary
from vtok_fast.swap.patch import Calls
from vtok_fast.swap.record import Record

if TYPE_CHECKING:
    from vtok_fast.swap.patch import Patch


class Report(Record):
    """The result of `vtok_fast.accelerate`.

    Printed, it is short: the verdict, the whole model, the modules by kind; `details` has each of them.

    Attributes:
        swapped, skipped: lists of `Entry`, in the model's order.
        contract: "close", "exact" or "fast". Each entry has its own: under "fast" a module that multiplies
            nothing in e4m3, or failed with it, is "close".
        model: the name of the model's class.
        end_to_end: the whole model's error and bound, time and memory on ``example``, with a ``why`` where it
            is beyond the bound (a token that falls to the other side of a rounding threshold does that: see
            ``tokens``); None where no example was given.
        psnr: of the whole model's result on ``example`` against float64, in dB, by the result's own range;
            None where nothing is multiplied in e4m3.
        tokens: a `vtok_fast.parity.TokenParity` for each FSQ quantizer of the model, on ``example``.
        notes: what else could not be measured, and why.
    """

    def __init__(self, contract: str, model: str = ""):
        super().__init__(contract, model)
        self._warned: list[str] = []
        self._patches: list[Patch] = []
        self._on_revert: list[Any] = []

    @property
    def ok(self) -> bool:
        """Whether all that was measured is within its contract: no swap had to be taken back for its error,
        the whole model is within its bound on ``example`` (or only tokens differ that may), and so are the
        tokens."""
        return summary.holds(self)

    @property
    def active(self) -> bool:
        """Whether the swaps are in place."""
        return any(patch.installed for patch in self._patches)

    def ran(self) -> dict[str, int]:
        """How often each swapped module's swap has run since, by path. Calls within a graph of
        ``torch.compile`` are not counted."""
        return {path: calls.ran for path, calls in self._calls.items()}

    def _calls_of(self, path: str) -> Calls:
        return self._calls.setdefault(path, Calls(path, self._warned))

    def _take_out(self, why_not: Callable[[Calls], Reason]) -> None:
        """Undoes the swaps for whose calls a reason is found, and counts anew."""
        out: dict[str, str] = {path: why for path, c in self._calls.items() if (why := why_not(c))}
        stays = [p for p in self._patches if p.swap.what and p.calls.path not in out]
        for patch in self._patches[::-1]:
            if patch.swap.what and patch not in stays or not stays:  # those without words only serve others
                patch.remove()
                self._patches.remove(patch)
        self.skipped += [replace(e, why=out[e.path]) for e in self.swapped if e.path in out]
        self.swapped = [e for e in self.swapped if e.path not in out]
        for path, calls in list(self._calls.items()):
            if path in out:
                del self._calls[path]
            calls.ran, calls.bypassed, calls.why = 0, 0, ""
        self._warned.clear()

    def _take_back(self, paths: list[str], whole: Parity) -> None:
        """Takes out swaps that are within their contracts, for the sake of the whole model, which is not."""
        why = f"the whole model was beyond its contract with it: {whole}"
        self._take_out(lambda calls: why if calls.path in paths else None)
        self.skipped = [
            replace(e, error=whole.error, bound=whole.bound, note=summary.own_error(e)) if e.why == why else e
            for e in self.skipped
        ]

    def _note(self, note: str) -> None:
        """What is said once."""
        if note not in self.notes:
            self.notes.append(note)

    def revert(self) -> None:
        """Gives the model back as it was. Calling it again does nothing."""
        for patch in reversed(self._patches):
            patch.remove()
        self._patches.clear()
        for undo in self._on_revert:
            undo()
        self._on_revert.clear()

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "model": self.model,
            "contract": self.contract,
            "active": self.active,
            "swapped": [asdict(e) for e in self.swapped],
            "skipped": [asdict(e) for e in self.skipped],
            "end_to_end": None if self.end_to_end is None else asdict(self.end_to_end),
            "psnr": self.psnr,
            "tokens": [asdict(t) | {"ok": t.ok} for t in self.tokens],
            "notes": self.notes,
            "ran": self.ran(),
            "bypassed": {path: asdict(b) for path, b in self.bypassed.items()},
        }

    def to_json(self, **options: Any) -> str:
        """The report as JSON; ``options`` go to ``json.dumps``."""
        return json.dumps(self.to_dict(), **{"indent": 2, **options})

    def __repr__(self) -> str:
        return (
            f"<Report: {len(self.swapped)} swapped, {len(self.skipped)} left alone, contract {self.contract}>"
        )

    def __str__(self) -> str:
        return _printed(summary.summary(self))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from summary.summary(self)

    def details(self) -> str:
        """Every module, one a row: what it runs now or why it was left alone, its error, speed-up and
        memory."""
        return _printed(summary.details(self), width=160)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the verdict, and module by module time and memory before and after and the error against its
        bound; what failed is red (needs matplotlib).

        Returns the figure; with ``path`` (.png, .svg or .pdf) it is also written there.
        """
        figure = report_picture.draw(self)
        if path is not None:
            write_atomically(
                path,
                lambda temporary: figure.savefig(temporary, dpi=130, format=Path(path).suffix[1:] or "png"),
            )
        return figure


def _printed(parts: Iterable[Any], width: int = 120) -> str:
    from rich.console import Console

    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return capture.get()
