"""What a `Report` says: the verdict, the whole model, the kinds of modules; and module by module."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from vtok_fast.swap.record import Entry, Record

LEAST_MS = 1.0  # what is shorter is told from noise by many runs, not by the few of a check


def speedup(e: Entry) -> float | None:
    """How many times faster; None where it was not measured or is too short to say."""
    if e.eager_ms is None or e.fast_ms is None or min(e.eager_ms, e.fast_ms) < LEAST_MS:
        return None
    return e.eager_ms / e.fast_ms


def memory(e: Entry) -> float | None:
    """Which share of eager's memory it takes; None where it was not measured."""
    return e.fast_bytes / e.eager_bytes if e.eager_bytes and e.fast_bytes is not None else None


def own_error(e: Entry) -> str:
    """The error that a module had by itself; empty where it was not measured."""
    if e.error is None or e.bound is None:
        return ""
    return f"by itself it had an error of {e.error:.1e}, {e.bound:.1e} allowed"


def failed(report: Record) -> list[Entry]:
    """The swaps that were beyond their bound, and were taken back."""
    return [
        e for e in report.skipped if e.error is not None and e.bound is not None and not e.error <= e.bound
    ]


def problems(report: Record) -> Iterator[str]:
    """What is beyond its contract, in a sentence each."""
    for e in failed(report):
        yield f"{e.path or 'the model'} was beyond its contract and runs as before: {e.why}"
    for tokens in report.tokens:
        if not tokens.ok and report.psnr is None:  # what e4m3 does to tokens is said, and has no bound
            yield f"too many tokens differ: {tokens}"
    e = report.end_to_end
    if e is not None and e.why and not report.flips:
        yield f"the whole model is {e.why}"


def holds(report: Record) -> bool:
    """Whether all that was measured is within its contract."""
    return next(problems(report), None) is None


def verdict(report: Record) -> str:
    """One line."""
    found = list(problems(report))
    counts = f"{len(report.swapped)} modules swapped, {len(report.skipped)} left alone"
    if found:
        return f"FAILED: {counts}; {found[0]}" + (f" (and {len(found) - 1} more)" if len(found) > 1 else "")
    if not report.swapped:
        return f"Nothing was swapped: {counts}"
    measured = [e for e in (*report.swapped, report.end_to_end) if e is not None and e.error is not None]
    if not measured:
        return f"{counts}; nothing was measured"
    return f"OK: {counts}; all that was measured is within the contract {report.contract}"


def whole(report: Record) -> str:
    """Speed, memory and error of the whole model, or how to get them."""
    e = report.end_to_end
    if e is None:
        errors = [(s.error / s.bound, s) for s in report.swapped if s.error is not None and s.bound]
        text = "Whole model: not run; accelerate(model, example=input) measures its speed, memory and error."
        if errors:
            worst = max(errors, key=lambda pair: pair[0])[1]
            text += f" Largest error of a module: {worst.error:.1e}, {worst.bound:.1e} allowed."
        return text
    parts = []
    if (ratio := speedup(e)) is not None:
        faster = f"{ratio:.2f} times faster" if ratio >= 1 else f"{1 / ratio:.2f} times slower"
        parts.append(f"{faster} ({_ms(e.eager_ms)}, now {_ms(e.fast_ms)})")
    elif e.eager_ms is not None and e.fast_ms is not None:
        parts.append("too short to time on this example")
    if (share := memory(e)) is not None:
        parts.append(f"{share:.2f} of the memory of its tensors")
    if report.psnr is not None:
        parts.append(f"{report.psnr:.1f} dB against float64")
    if e.error is not None:
        allowed = "" if e.bound is None else f", {e.bound:.1e} allowed"
        parts.append("equal to the bit" if e.error == 0 else f"error {e.error:.1e} against float64{allowed}")
    return f"Whole model, on the example: {'; '.join(parts)}."


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value / 1e3:.2f} s" if value >= 1e3 else f"{value:.3g} ms"


def summary(report: Record) -> Iterator[Any]:
    """Lines and tables for rich."""
    from rich.text import Text

    title = f"{report.model}: " if report.model else ""
    yield Text(title + verdict(report), style="bold" if holds(report) else "bold red")
    yield Text(whole(report))
    for tokens in report.tokens:
        yield Text(f"Tokens: {tokens}{'' if tokens.ok or report.psnr is not None else ': TOO MANY'}.")
    for problem in list(problems(report))[1:]:
        yield Text(f"FAILED: {problem}", style="red")
    if report.swapped:
        yield _kinds(report.swapped)
    if report.skipped:
        yield _reasons(report.skipped)
    for note in report.notes:
        yield Text(note)
    if bypassed := report.bypassed:
        path, first = next(iter(bypassed.items()))
        yield Text(
            f"{len(bypassed)} of the swapped modules left calls to their class, such as "
            f"{path or 'the model'}: {first.why}."
        )
    yield Text("print(report.details()) shows every module, report.plot(file) draws them.")


def _kinds(entries: list[Entry]) -> Any:
    """A row for each kind of module and what it now runs."""
    from rich.table import Table
    from rich.text import Text

    groups: dict[tuple[str, str], list[Entry]] = {}
    for e in entries:
        groups.setdefault((e.kind, e.what), []).append(e)
    timed = any(speedup(e) is not None for e in entries)
    headings = ("kind", "modules", "now", "largest error", "allowed", *(("speed-up",) if timed else ()))
    table = Table(*headings, title="Swapped", title_justify="left")
    for (kind, what), members in groups.items():
        judged = [e for e in members if e.error is not None]
        worst = max(judged, key=lambda e: e.error / e.bound if e.bound else e.error, default=None)
        ratios = [r for e in members if (r := speedup(e)) is not None]
        row = [kind, str(len(members)), what, *_error(worst)]
        if timed:
            row.append(f"{statistics.median(ratios):.2f} (median of {len(ratios)})" if ratios else "")
        table.add_row(*map(Text, row))
    return table


def _reasons(entries: list[Entry]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "modules", "why", title="Left alone", title_justify="left")
    for (kind, why), count in Counter((e.kind, e.why) for e in entries).items():
        table.add_row(Text(kind), str(count), Text(why))
    return table


def _error(e: Entry | None) -> tuple[str, str]:
    if e is None or e.error is None:
        return "", ""
    return "equal" if e.error == 0 else f"{e.error:.1e}", f"{e.bound:.1e}" if e.bound else ""


def _with_whole_paths(table: Any, entries: list[Entry]) -> Any:
    """A path is to be searched for, and so is not broken."""
    table.columns[0].no_wrap = True
    table.columns[0].min_width = max(len(e.path) for e in entries)
    return table


def details(report: Record) -> Iterator[Any]:
    """The tables of every module, for rich."""
    from rich.table import Table
    from rich.text import Text

    if report.swapped:
        headings = ("module", "kind", "now", "error", "allowed", "speed-up", "memory")
        table = Table(*headings, title="Swapped", title_justify="left")
        for e in report.swapped:
            ratio, share = speedup(e), memory(e)
            texts = ("" if ratio is None else f"{ratio:.2f}", "" if share is None else f"{share:.2f}")
            table.add_row(*map(Text, (e.path or "(model)", e.kind, e.what, *_error(e), *texts)))
        yield _with_whole_paths(table, report.swapped)
    if report.skipped:
        table = Table("module", "kind", "why", title="Left alone", title_justify="left")
        for e in report.skipped:
            table.add_row(*map(Text, (e.path or "(model)", e.kind, e.why)))
        yield _with_whole_paths(table, report.skipped)
    yield Text(
        f"Speed-ups are of the shortest of several runs, and stand where both took {LEAST_MS:g} ms or more."
    )
