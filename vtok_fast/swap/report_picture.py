"""The picture of a `Report`."""

from __future__ import annotations

import textwrap
from typing import Any

from vtok_fast.swap import summary
from vtok_fast.swap.record import Entry, Record

GRAY, BLUE, RED = "#b8b8b8", "#2a78b5", "#c0392b"
MOST = 60  # rows; those that take longest where there are more


def draw(report: Record) -> Any:
    """A figure of matplotlib: the verdict and the whole model above, then time, memory and error module by
    module. What failed is red."""
    from matplotlib.figure import Figure

    broken = summary.failed(report)
    entries = [e for e in (*report.swapped, *broken) if e.fast_ms is not None]
    left_out = len(entries) - MOST
    if left_out > 0:
        kept = sorted(entries, key=lambda e: (e in broken, e.eager_ms or 0.0))[-MOST:]
        entries = [e for e in entries if e in kept]
    lines = textwrap.wrap(summary.verdict(report), 150) + textwrap.wrap(summary.whole(report), 150)
    lines += [textwrap.shorten(problem, 130) for problem in list(summary.problems(report))[1:4]]
    if left_out > 0:
        lines.append(f"The {MOST} modules that take longest; {left_out} are not shown.")
    figure = Figure(figsize=(14, 1.6 + 0.24 * max(len(entries), 4) + 0.22 * len(lines)), layout="constrained")
    color = "black" if summary.holds(report) else RED
    title = f"vtok_fast.accelerate({report.model or 'model'})\n"
    figure.suptitle(title + "\n".join(lines), x=0.01, ha="left", size=10.5, color=color)
    if not entries:
        axes = figure.subplots()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no module was measured", ha="center", va="center", color="#7b8794")
        return figure
    time, memory, error = figure.subplots(1, 3, sharey=True)
    _pairs(time, [(e.eager_ms, e.fast_ms) for e in entries], "ms, on the check's inputs")
    _pairs(
        memory,
        [((e.eager_bytes or 0) / 2**20, (e.fast_bytes or 0) / 2**20) for e in entries],
        "MiB of tensors at their highest",
    )
    time.set(yticks=range(len(entries)), yticklabels=[e.path or "(model)" for e in entries])
    time.tick_params(axis="y", labelsize=7)
    for label, e in zip(time.get_yticklabels(), entries):
        label.set_color(RED if e in broken else "black")
    time.set_ylim(len(entries) - 0.4, -0.6)
    time.legend(loc="lower right")
    _errors(error, entries, broken)
    return figure


def _pairs(axes: Any, pairs: list[tuple[Any, Any]], label: str) -> None:
    rows = range(len(pairs))
    axes.barh([r - 0.2 for r in rows], [a for a, _ in pairs], 0.4, label="before", color=GRAY)
    axes.barh([r + 0.2 for r in rows], [b for _, b in pairs], 0.4, label="vtok_fast", color=BLUE)
    axes.set(xlabel=label)


def _errors(axes: Any, entries: list[Entry], broken: list[Entry]) -> None:
    shares = [e.error / e.bound if e.error and e.bound else 0.0 for e in entries]
    shown = [min(share, 2.0) if share == share else 2.0 for share in shares]
    colors = [RED if e in broken else BLUE for e in entries]
    axes.barh(range(len(entries)), shown, color=colors)
    for row, (share, e) in enumerate(zip(shares, entries)):
        if e in broken:
            axes.text(1.03, row, f"FAILED: {share:.3g} times the bound", color="white", va="center", size=7)
    axes.axvline(1, color=RED, linewidth=1)
    axes.set(xlabel="error / allowed error", xlim=(0, 2.05 if broken else 1.05))
