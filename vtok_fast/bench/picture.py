"""``--plot``: the roofline of the machine with every kernel on it, and how many times faster than its peers
each is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vtok_fast.bench import products
from vtok_fast.bench.report import ratio

NO_OPERATIONS = 1 / 16  # operations per byte at which kernels stand whose operations are not counted
WINOGRAD = "\noperations that are done: of Winograd, a quarter of the definition's products"
COLORS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


def draw(results: dict[str, Any], path: str | os.PathLike) -> None:
    """Writes the picture (PNG, SVG or PDF by its ending). Raises ValueError where the results have no
    ceilings."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sections = {
        name: s for name, s in results["sections"].items() if s["cases"] and "variants" not in s["cases"][0]
    }
    limits = next((s["ceilings"] for s in sections.values() if s.get("ceilings")), None)
    if limits is None:
        raise ValueError("plot: these results have no ceilings; measure again")
    rows = sum(len(s["cases"]) for s in sections.values())
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(15, max(5.0, 1.5 + 0.22 * rows)), layout="constrained"
    )
    machine = results["machine"]
    figure.suptitle(f"{machine.get('gpu') or machine['cpu']}, torch {next(iter(sections.values()))['torch']}")
    _roofline(left, sections, limits)
    _bars(right, sections)
    path = Path(path)
    # A name that ends as the picture's does, which tells its format
    temporary = path.with_name(f".part-{path.name}")
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    os.replace(temporary, path)


def points(section: dict[str, Any]) -> list[tuple[float, float, str]]:
    """(operations per byte, operations per second, role) of ours and of the best peer in each case. Of ours
    the operations are those that are done: Winograd's are fewer."""
    found = []
    for case in section["cases"]:
        facts = case["facts"]
        size = facts.get("megabytes", 0.0) * 1e6
        if not size:
            continue
        counted = {"best": facts.get("gflop"), "ours": products.done(facts)}
        for role, gflop in counted.items():
            work = max((gflop or 0.0) * 1e9, NO_OPERATIONS * size)
            found.append((work / size, work / case["seconds"][case[role]]["median"], role))
    return found


def _roofline(axes: Any, sections: dict[str, Any], limits: dict[str, Any]) -> None:
    bandwidth = limits["copy_gb_s"] * 1e9
    shown = {name: points(s) for name, s in sections.items()}
    most = max(
        [4 * x for p in shown.values() for x, _, _ in p]
        + [16 * rate * 1e12 / bandwidth for rate in limits["matmul_tflop_s"].values()]
    )
    for dtype, rate in limits["matmul_tflop_s"].items():
        knee = rate * 1e12 / bandwidth
        axes.plot(
            [NO_OPERATIONS / 2, knee, most],
            [NO_OPERATIONS / 2 * bandwidth, rate * 1e12, rate * 1e12],
            label=f"roof, {dtype}",
            color="black",
            linestyle="-" if dtype == next(iter(limits["matmul_tflop_s"])) else ":",
        )
    for color, (name, found) in zip(COLORS, shown.items()):
        for role, marker, face in (("best", "o", "none"), ("ours", "o", color)):
            chosen = [(x, y) for x, y, r in found if r == role]
            if chosen:
                axes.scatter(
                    *zip(*chosen),
                    marker=marker,
                    facecolors=face,
                    edgecolors=color,
                    s=28,
                    label=name if role == "ours" else None,
                )
    algorithms = {c["facts"].get("algorithm", "") for s in sections.values() for c in s["cases"]}
    winograd = any(name.startswith("winograd") for name in algorithms)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel=f"operations per byte ({NO_OPERATIONS:g}: moves bytes only)",
        ylabel="operations per second",
        title="roofline: full circles ours, empty ones the best peer" + (WINOGRAD if winograd else ""),
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()


def _bars(axes: Any, sections: dict[str, Any]) -> None:
    labels, best, eager, colors = [], [], [], []
    for color, (name, section) in zip(COLORS, sections.items()):
        for case in section["cases"]:
            labels.append(f"{name}: {case['case']}")
            best.append((ratio(case, "best") or {}).get("median", 0.0))
            eager.append((ratio(case, "eager") or {}).get("median", 0.0))
            colors.append(color)
    places = range(len(labels))
    axes.barh(places, eager, color=colors, alpha=0.35)
    axes.barh(places, best, color=colors, height=0.45)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(
        yticks=places,
        yticklabels=labels,
        xlabel="times faster",
        title="times faster: pale than eager, full than the best peer",
    )
    axes.tick_params(axis="y", labelsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.01)
