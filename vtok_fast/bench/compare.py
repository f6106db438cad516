"""``vtok-fast bench compare a.json b.json``: what became faster or slower, told from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtok_fast.bench.report import kind, same_machine

LEAST_CHANGE = 0.03


@dataclass(frozen=True)
class Change:
    """One case in both results. ``before`` and ``after`` are figures of which more is better, with their
    quartiles: on a CPU times faster than the same run's eager peer, because the machine's own speed moves; on
    a GPU calls per second. ``change`` is after / before - 1; ``noise`` the larger half interquartile range of
    the two, relative.

    ``verdict``: ``slower`` or ``faster`` where the quartiles of the two do not overlap and the change is 3 %
        or more; ``same``.
    """

    section: str
    case: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def change(self) -> float:
        return self.after["median"] / self.before["median"] - 1

    @property
    def noise(self) -> float:
        return max((s["q3"] - s["q1"]) / 2 / s["median"] for s in (self.before, self.after))

    @property
    def verdict(self) -> str:
        if abs(self.change) < LEAST_CHANGE:
            return "same"
        if self.after["q3"] < self.before["q1"]:
            return "slower"
        return "faster" if self.after["q1"] > self.before["q3"] else "same"

    def as_json(self) -> dict[str, Any]:
        return {
            "section": self.section,
            "case": self.case,
            "before": self.before,
            "after": self.after,
            "change": self.change,
            "noise": self.noise,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Comparison:
    """All changes, what only one of the two has (section and case), and what to keep in mind: other machines
    or versions."""

    changes: list[Change]
    only_before: list[str]
    only_after: list[str]
    remarks: list[str]

    @property
    def regressions(self) -> list[Change]:
        return [c for c in self.changes if c.verdict == "slower"]


def compare(before: dict[str, Any], after: dict[str, Any]) -> Comparison:
    """Compares two results as `vtok_fast.bench.report.load` gives them. Raises ValueError for a CPU's
    and a GPU's."""
    if kind(before["machine"]) != kind(after["machine"]):
        raise ValueError(
            f"compare: the first has results of a {kind(before['machine']).upper()}, the second of a "
            f"{kind(after['machine']).upper()}"
        )
    first, second = _figures(before), _figures(after)
    changes = [Change(*key, first[key], second[key]) for key in first if key in second]
    remarks = [] if same_machine(before["machine"], after["machine"]) else ["these are two machines"]
    for name in before["sections"].keys() & after["sections"].keys():
        for key in ("torch", "triton", "cudnn", "driver", "threads", "quick"):
            old, new = (r["sections"][name].get(key) for r in (before, after))
            if old != new and f"{key}: {old}, then {new}" not in remarks:
                remarks.append(f"{key}: {old}, then {new}")
    return Comparison(
        changes,
        [" ".join(k) for k in first if k not in second],
        [" ".join(k) for k in second if k not in first],
        remarks,
    )


def _figures(results: dict[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    on_gpu, found = kind(results["machine"]) == "gpu", {}
    for name, section in results["sections"].items():
        for case in section["cases"]:
            if "variants" in case:
                continue
            own = case["seconds"][case["ours"]]
            if on_gpu:
                found[name, case["case"]] = {
                    "median": 1 / own["median"],
                    "q1": 1 / own["q3"],
                    "q3": 1 / own["q1"],
                }
            elif case["eager"] in case["ratios"][case["ours"]]:
                found[name, case["case"]] = case["ratios"][case["ours"]][case["eager"]]
    return found


def table(comparison: Comparison, *, changed: bool = False) -> Any:
    """A table of all cases (or of what changed) for rich, the largest loss first."""
    from rich.table import Table

    result = Table("section", "case", "before", "after", "after / before", "noise", "verdict")
    for c in sorted(comparison.changes, key=lambda c: c.change):
        if c.verdict != "same" or not changed:
            style = {"slower": "red", "faster": "green"}.get(c.verdict)
            result.add_row(
                c.section,
                c.case,
                f"{c.before['median']:.4g}",
                f"{c.after['median']:.4g}",
                f"{1 + c.change:.3f}",
                f"±{c.noise:.1%}",
                c.verdict,
                style=style,
            )
    return result
