"""Results as a table for the terminal, as JSON, and as the markdown of the README."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok_fast.bench.harness import geometric_mean

VERSION = 1


@dataclass(frozen=True)
class Target:
    """What a section is meant to reach on a ``machine``, "cpu" or "gpu": the geometric ``mean`` or the
    ``least`` of its ratios to ``against``; against ``roofline`` it is our own share of what this machine can
    do. ``case`` is a part of the case's name."""

    section: str
    against: str
    statistic: str
    value: float
    group: str | None = None
    case: str = ""
    machine: str = "cpu"

    def __str__(self) -> str:
        what = "geometric mean" if self.statistic == "mean" else "least"
        scope = ", ".join(x for x in (self.section, self.group, self.case) if x)
        return f"{scope}: {what} against {self.against}"


TARGETS = (
    Target("causal_conv3d", "best", "mean", 2.5, "3x3 planes"),
    Target("causal_conv3d", "best", "mean", 1.05, "rest"),
    Target("causal_conv3d", "best", "least", 0.93),
    Target("norm_act", "eager", "mean", 3.0),
    Target("fsq", "eager", "mean", 15.0),
    Target("fsq", "plain copy", "least", 0.5, "large"),
    Target("vidtok", "eager", "least", 2.0),
    Target("scope_attention", "eager", "least", 3.3, "time invariant", "tivtok-t128 96x8x1024x4 12x64"),
    Target("scope_attention", "eager", "least", 1.6, "block causal"),
    Target("token_packing", "eager", "mean", 3.0, "router"),
    Target("token_packing", "eager", "mean", 1.0, "pack"),
    Target("token_packing", "eager", "mean", 1.0, "unpack"),
    Target("causal_conv3d", "best", "mean", 1.5, machine="gpu"),
    Target("norm_act", "roofline", "mean", 0.85, machine="gpu"),
    Target("fsq", "roofline", "mean", 0.9, "large", machine="gpu"),
    Target("fsq", "eager", "mean", 8.0, "large", machine="gpu"),
    Target("scope_attention", "FlexAttention", "mean", 1.3, machine="gpu"),
    Target("token_packing", "roofline", "mean", 0.85, machine="gpu"),
    Target("vidtok", "eager", "least", 2.0, machine="gpu"),
    Target("vidtok", "best", "least", 1.4, machine="gpu"),
)
MEMORY_TARGETS = {"vtok_fast, no weight cache": 0.6, "vtok_fast": 1.0}


# ---- files -------------------------------------------------------------------------------------------------


def save(path: str | os.PathLike, machine: dict[str, Any], sections: dict[str, Any]) -> None:
    """Writes results; sections of an existing file of the same machine that are not among them stay. The file
    is replaced whole.

    Raises ValueError where the file belongs to another machine.
    """
    path = Path(path)
    kept = {}
    if path.exists():
        old = load(path)
        if not same_machine(old["machine"], machine):
            raise ValueError(
                f"{path} holds the results of another machine, "
                f"{old['machine'].get('gpu') or old['machine']['cpu']}"
            )
        kept = old["sections"]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(
        json.dumps({"version": VERSION, "machine": machine, "sections": kept | sections}, indent=1) + "\n"
    )
    os.replace(temporary, path)


def same_machine(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two results may stand side by side: the same GPU, or where there is none the same processor."""
    keys = ("gpu",) if one.get("gpu") else ("gpu", "cpu", "family", "model", "cores")
    return all(one.get(key) == other.get(key) for key in keys)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Reads results. Raises ValueError if the file is not a results file."""
    try:
        results = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(results, dict) or results.get("version") != VERSION:
        raise ValueError(f"{path}: expected benchmark results of version {VERSION}")
    return results


# ---- figures -----------------------------------------------------------------------------------------------


def ratio(record: dict[str, Any], against: str, subject: str | None = None) -> dict[str, float] | None:
    """How many times faster ``subject`` (ours) is than ``against`` (a name, ``eager`` or ``best``); None
    where that is missing."""
    name = record.get(against, against)
    return record["ratios"].get(subject or record["ours"], {}).get(name)


def figures(cases: list[dict[str, Any]], against: str, subject: str | None = None) -> list[float]:
    return [r["median"] for case in cases if (r := ratio(case, against, subject))]


def reached(target: Target, sections: dict[str, Any]) -> float | None:
    """The figure that belongs to a target, None where nothing was measured."""
    cases = [
        c
        for c in sections.get(target.section, {"cases": []})["cases"]
        if target.group in (None, c["group"])
        and c["case"].startswith(target.case)
        and not c["case"].startswith("own ")
    ]
    values = shares(cases) if target.against == "roofline" else figures(cases, target.against)
    return None if not values else geometric_mean(values) if target.statistic == "mean" else min(values)


def shares(cases: list[dict[str, Any]]) -> list[float]:
    """Our shares of the roofline, where they were measured."""
    return [
        case["seconds"][case["ours"]]["roofline"]
        for case in cases
        if "roofline" in case["seconds"][case["ours"]]
    ]


def kind(machine: dict[str, Any]) -> str:
    return "gpu" if machine.get("gpu") else "cpu"


def memory_ratios(record: dict[str, Any]) -> dict[str, float]:
    """Peak of each variant over eager's."""
    variants = record["variants"]
    return {name: v["peak"] / variants["eager"]["peak"] for name, v in variants.items() if name != "eager"}


def _groups(cases: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault(case["group"], []).append(case)
    return groups


def _variants(cases: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for c in cases for name in c["ratios"] if name != c["ours"]))


# ---- terminal ----------------------------------------------------------------------------------------------


def line(section: str, record: dict[str, Any]) -> str:
    """One case in one line, for the running output."""
    if "variants" in record:
        peaks = ", ".join(
            f"{name} {v['peak'] / 2**30:.2f} GiB {v['seconds']:.1f} s"
            for name, v in record["variants"].items()
        )
        return f"{section}: {record['case']}: {peaks}"
    texts = [f"{against} {r['median']:.2f}" for against in ("best", "eager") if (r := ratio(record, against))]
    own = record["seconds"][record["ours"]]
    texts += [f"{form(own[key])} {heading}" for heading, key, form in _RATES[:3] if key in own]
    return f"{section}: {record['case']}: {', '.join(texts)} ({record['rounds']} rounds)"


def show(results: dict[str, Any]) -> None:
    """Prints every section's table and the targets."""
    from rich.console import Console

    console = Console(width=max(180, Console().width))
    console.print(_machine_line(results["machine"]))
    for name, section in results["sections"].items():
        console.print(_memory_table(section) if name == "memory" else _table(name, section))
    for section in results["sections"].values():
        for case in section["cases"]:
            for peer, why in case.get("missing", {}).items():
                console.print(f"missing: {peer} ({case['case']}): {why}", markup=False)
            for name, entry in case.get("seconds", {}).items():
                if "no_graph" in entry:
                    console.print(
                        f"no CUDA graph: {name} ({case['case']}): {entry['no_graph']}", markup=False
                    )
    if any("roofline" in e for s in results["sections"].values() for c in s["cases"]
           for e in c.get("seconds", {}).values()):  # fmt: skip
        console.print(
            "TFLOP/s and the share of the roofline count the operations that are done: of the definition's, "
            "Winograd does a quarter."
        )
    if (targets := _target_table(results)).row_count:  # own shapes have none
        console.print(targets)


def counted(number: int, noun: str = "case") -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _spread(r: dict[str, float] | None) -> str:
    return "-" if r is None else f"{r['median']:.2f} [{r['q1']:.2f}-{r['q3']:.2f}]"


# What was measured of ours beside its time: heading, key, and how to print it.
_RATES: list[tuple[str, str, Callable[[float], str]]] = [
    ("GB/s", "gb_s", "{:.3g}".format),
    ("TFLOP/s", "tflop_s", "{:.3g}".format),
    ("of roofline", "roofline", "{:.0%}".format),
    ("graph ms", "graph_seconds", _ms),
    ("peak MB", "peak_bytes", lambda n: f"{n / 1e6:.0f}"),
    ("host ms", "host_seconds", lambda s: f"{s * 1e3:.2g}"),
]

# Facts of a case that get a column of their own: heading, and how to print the record.
_COLUMNS: dict[str, list[tuple[str, Callable[[dict], str]]]] = {
    "causal_conv3d": [
        ("algorithm", lambda c: c["facts"]["algorithm"]),
        ("cache MB", lambda c: f"{c['facts']['cached_bytes'] / 1e6:.1f}"),
    ],
    "norm_act": [],
    "fsq": [
        ("/ copy", lambda c: _spread(ratio(c, "plain copy"))),
        (
            "differ (eager)",
            lambda c: f"{c['facts']['differ_from_float64']} ({c['facts']['eager_differ_from_float64']})",
        ),
    ],
    "vidtok": [
        ("tokens equal", lambda c: f"{c['facts']['tokens_equal']} of {c['facts']['tokens']}"),
        ("difference", lambda c: f"{c['facts']['decoded_difference']:.1e}"),
    ],
}
_COLUMNS["causal_conv3d"].append(
    ("error / eager's", lambda c: f"{c['facts']['error']:.1e} / {c['facts']['eager_error']:.1e}")
)
_COLUMNS["norm_act"].append(_COLUMNS["causal_conv3d"][-1])


def _table(name: str, section: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    cases = section["cases"]
    device = section.get("device", "cpu")
    where = (
        f"{section['threads']} threads, load before {section['load_before']}" if device == "cpu" else device
    )
    table = Table(
        title=f"{name}: {where}, torch {section['torch']}, commit {section['commit']}", title_justify="left"
    )
    variants, columns = _variants(cases), _COLUMNS.get(name, [])
    rates = [
        (heading, key, form)
        for heading, key, form in _RATES
        if any(key in c["seconds"][c["ours"]] for c in cases)
    ]
    for heading in (
        "case",
        "eager ms",
        "best peer",
        "ms",
        "ours ms",
        escape("x best [quartiles]"),
        *(f"x best, {v.partition(', ')[2]}" for v in variants),
        "x eager",
        *(r[0] for r in rates),
        *(c[0] for c in columns),
    ):
        table.add_column(
            heading, justify="left" if heading in ("case", "best peer", "algorithm") else "right"
        )
    for group, members in _groups(cases).items():
        for c in members:
            seconds = c["seconds"]
            style = "red" if c["wrong"] else None
            own = seconds[c["ours"]]
            table.add_row(
                c["case"],
                _ms(seconds[c["eager"]]["median"]),
                escape(c["best"]),
                _ms(seconds[c["best"]]["median"]),
                _ms(own["median"]),
                _spread(ratio(c, "best")),
                *(_spread(ratio(c, "best", v)).partition(" ")[0] for v in variants),
                _spread(ratio(c, "eager")).partition(" ")[0],
                *(form(own[key]) if key in own else "-" for _, key, form in rates),
                *(show(c) for _, show in columns),
                style=style,
            )
        best = [figures(members, "best", v) for v in (None, *variants)]
        row = [f"{geometric_mean(v):.2f}" if v else "-" for v in best]
        table.add_row(
            f"geometric mean, {group} ({len(members)})",
            "",
            "",
            "",
            "",
            f"{row[0]} (least {min(best[0]):.2f})",
            *row[1:],
            f"{geometric_mean(figures(members, 'eager')):.2f}",
            style="bold",
            end_section=True,
        )
    for case, reason in section.get("failed", {}).items():
        table.add_row(escape(f"{case}: not measured: {reason}"), style="red")
    return table


def _memory_table(section: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(
        "case",
        "variant",
        "peak GiB",
        "of eager's",
        "weight cache GiB",
        "model GiB",
        "s, one pass",
        title="peak memory",
        title_justify="left",
    )
    for record in section["cases"]:
        shares = memory_ratios(record)
        for name, v in record["variants"].items():
            share = f"{shares[name]:.2f}" if name in shares else ""
            table.add_row(
                record["case"],
                name,
                *(
                    f"{x:.2f}" if isinstance(x, float) else x
                    for x in (
                        v["peak"] / 2**30,
                        share,
                        v["weight_cache"] / 2**30,
                        v["model"] / 2**30,
                        v["seconds"],
                    )
                ),
            )
    return table


def _target_table(results: dict[str, Any]) -> Any:
    from rich.table import Table

    table, sections = (
        Table("target", "wanted", "measured", "", title="targets", title_justify="left"),
        results["sections"],
    )
    for t in TARGETS:
        if t.machine == kind(results["machine"]) and (value := reached(t, sections)) is not None:
            table.add_row(
                str(t), f">= {t.value}", f"{value:.2f}", "yes" if value >= t.value else "[red]no[/red]"
            )
    for record in sections.get("memory", {"cases": []})["cases"]:
        for name, value in memory_ratios(record).items():
            table.add_row(
                f"peak memory of {name}, share of eager's",
                f"<= {MEMORY_TARGETS[name]}",
                f"{value:.2f}",
                "yes" if value <= MEMORY_TARGETS[name] else "[red]no[/red]",
            )
    return table


# ---- README ------------------------------------------------------------------------------------------------


def _machine_line(machine: dict[str, Any]) -> str:
    kind = (
        f" (family {machine['family']}, model {machine['model']})"
        if machine.get("family") is not None
        else ""
    )
    if machine.get("gpu"):
        return (
            f"{machine['gpu']} ({machine['gpu_memory_gib']} GiB, compute capability "
            f"{machine['capability']}, kernels "
            f"{', '.join(machine['cuda_archs']) or 'none'})"
        )
    caches = ", ".join(f"{level} {size}" for level, size in machine["caches"].items())
    return f"{machine['cpu']}{kind}, {counted(machine['cores'], 'core')}, kernels {machine['isa']}, {caches}"


def markdown(results: dict[str, Any]) -> str:
    """The measured table of the README."""
    sections = results["sections"]
    states = {(s["torch"], s["threads"], s["commit"], s["date"][:10]) for s in sections.values()}
    lines = [
        f"Measured on {_machine_line(results['machine'])}; "
        + "; ".join(f"torch {t}, {n} threads, commit {c}, {d}" for t, n, c, d in sorted(states, key=str))
        + "."
        + (
            " A quick run: few small cases, figures mean little."
            if any(s["quick"] for s in sections.values())
            else ""
        ),
        "",
        "| | cases | times the best PyTorch | least | times eager |",
        "|---|---|---|---|---|",
    ]
    for name, section in sections.items():
        if name == "memory":
            continue
        for group, cases in _groups(section["cases"]).items():
            for subject in (None, *_variants(cases)):
                best, eager = figures(cases, "best", subject), figures(cases, "eager", subject)
                label = f"{name}, {group}" + (f" ({subject.partition(', ')[2]})" if subject else "")
                means = f"{geometric_mean(best):.2f} | {min(best):.2f} | {geometric_mean(eager):.2f}"
                lines.append(f"| {label} | {len(cases)} | {means} |")
    copies = {
        group: figures(cases, "plain copy")
        for group, cases in _groups(sections.get("fsq", {"cases": []})["cases"]).items()
    }
    if copies := [
        f"{1 / geometric_mean(values):.2f} times ({group})" for group, values in copies.items() if values
    ]:
        lines += ["", f"fsq takes {', '.join(copies)} as long as a plain copy of the same bytes."]
    if "memory" in sections:
        lines += [
            "",
            "| peak memory of one pass | GiB | of eager's | weight cache, GiB |",
            "|---|---|---|---|",
        ]
        for record in sections["memory"]["cases"]:
            shares = memory_ratios(record)
            case = record["case"].removesuffix(" memory")
            lines += [
                f"| {case}, {name} | {v['peak'] / 2**30:.2f} | {shares.get(name, 1.0):.2f} | "
                f"{v['weight_cache'] / 2**30:.2f} |"
                for name, v in record["variants"].items()
            ]
    return "\n".join(lines) + "\n"
