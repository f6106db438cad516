"""Writes what the documentation takes from the library and from measurements: `python scripts/docs.py
[--check]`.

- docs/pictures/: what scopes and paddings look like, drawn from `Scope.plot` and from `causal_conv3d` itself;
- the tables between `<!-- measured OP -->` and `<!-- end -->` in docs/, from benchmarks/results/*.json;
- the three figures of the front page, between `<!-- figures -->` and `<!-- end -->`;
- the table of all models, between `<!-- models -->` and `<!-- end -->`;
- that between `<!-- results FILE.json -->` and `<!-- end -->` in README.md: all of one such file.

With --check nothing is written; exit code 1 if a table is not what the results say.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

import vtok_fast
from vtok_fast import Scope
from vtok_fast.bench import report

ROOT = Path(__file__).resolve().parent.parent
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- measured (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
FRONT = re.compile(r"(<!-- figures -->\n).*?(<!-- end -->)", re.DOTALL)
MODEL_NAMES = re.compile(r"(<!-- models -->\n).*?(<!-- end -->)", re.DOTALL)
WHOLE = re.compile(r"(<!-- results ([\w.-]+\.json) -->\n).*?(<!-- end -->)", re.DOTALL)


# ---- tables ------------------------------------------------------------------------------------------------


def measured(op: str) -> str:
    """The figures of one op on every machine that has some, as Markdown."""
    lines = []
    for path in sorted(RESULTS.glob("*.json")):
        results = report.load(path)
        section = results["sections"].get(op)
        if not section:
            continue
        groups: dict[str, list] = {}
        for case in section["cases"]:
            groups.setdefault(case.get("group") or "all", []).append(case)
        state = f"torch {section['torch']}, {section['threads']} threads, commit {section['commit']}"
        lines += [
            f"{_machine(results['machine'])}; {state}.",
            "",
            "| cases | | times the best PyTorch | least | times eager |",
            "|---|---|---|---|---|",
        ]
        for group, cases in groups.items():
            best, eager = report.figures(cases, "best"), report.figures(cases, "eager")
            if best and eager:
                lines.append(
                    f"| {group} | {len(cases)} | {report.geometric_mean(best):.2f} | {min(best):.2f} | "
                    f"{report.geometric_mean(eager):.2f} |"
                )
        lines.append("")
    return "\n".join(lines) if lines else "No results file has measured this yet.\n"


def _machine(machine: dict) -> str:
    if machine.get("gpu"):
        return machine["gpu"]
    family = (
        f" (family {machine['family']}, model {machine['model']})"
        if machine.get("family") is not None
        else ""
    )
    return f"{machine['cpu']}{family}, {machine['cores']} cores, kernels {machine['isa']}"


FIGURES = "amd-epyc-family26-model2-2cores-avx512.json"


def figures() -> str:
    """The three figures of the front page: speed, memory and error, of one committed run."""
    results = report.load(RESULTS / FIGURES)
    sections = results["sections"]
    (case,) = [c for c in sections["vidtok"]["cases"] if "fsq_causal_488_32768" in c["case"]]
    speed = report.ratio(case, "best")["median"]
    share = report.memory_ratios(sections["memory"]["cases"][0])["vtok_fast"]
    convs = [c["facts"] for c in sections["causal_conv3d"]["cases"]]
    fast, eager = (max(c[key] for c in convs) for key in ("error", "eager_error"))
    return (
        f"| {speed:.2f} times | {share:.2f} | {fast:.1e} |\n|---|---|---|\n"
        "| as fast as the best PyTorch: a released VidTok, encode and decode "
        "| of PyTorch's peak memory, weight cache included "
        f"| largest error of {len(convs)} convolutions, PyTorch's {eager:.1e}, allowed "
        f"{vtok_fast.parity.floor(torch.float32):.1e} |\n\n"
        f"{_machine(results['machine'])}, float32, relative errors against float64.\n"
    )


def every_model() -> str:
    """A table of all configurations."""
    from vtok_fast.commands.names import MODELS

    pages = {"vidtok": "VidTok", "cosmos": "Cosmos", "promag": "ProMAG", "vtok": "VTok"}
    pages |= {"tivtok": "TivTok", "infotok": "InfoTok"}
    rows = [
        f"| [{pages[system]}]({system}.md) | {', '.join(f'`{system}/{name}`' for name in configs)} |\n"
        for system, configs in MODELS.items()
    ]
    return "| system | models |\n|---|---|\n" + "".join(rows)


def filled(text: str) -> str:
    """A page with its tables as the results have them."""
    text = FRONT.sub(lambda m: m[1] + figures() + m[2], text)
    text = MODEL_NAMES.sub(lambda m: m[1] + every_model() + m[2], text)
    text = MARK.sub(lambda m: m[1] + measured(m[2]) + "\n" + m[3], text)
    return WHOLE.sub(lambda m: m[1] + report.markdown(report.load(RESULTS / m[2])) + m[3], text)


# ---- pictures ----------------------------------------------------------------------------------------------


def scopes(path: Path) -> None:
    """Queries go down, keys to the right."""
    import matplotlib.pyplot as plt

    kinds = {
        "dense(12)": Scope.dense(12),
        "block_causal(4, 3)": Scope.block_causal(4, 3),
        "per_frame(4, 3)": Scope.per_frame(4, 3),
        "packed([0, 3, 5, 12])": Scope.packed([0, 3, 5, 12]),
        "time_invariant(tiv=3, tv=1,\npatches=3, slices=3)": Scope.time_invariant(
            tiv=3, tv=1, patches=3, slices=3
        ),
        "from_segments(\n[(0, 6, [(0, 2), (8, 12)]),\n(6, 12, [(3, 9)])], 12, 12)": Scope.from_segments(
            [(0, 6, [(0, 2), (8, 12)]), (6, 12, [(3, 9)])], 12, 12
        ),
    }
    figure, axes = plt.subplots(2, 3, figsize=(10, 7.6), layout="constrained")
    for (name, scope), ax in zip(kinds.items(), axes.flat):
        scope.plot(ax)
        ax.set_title(f"Scope.{name}\n{100 * scope.density():.3g} % of the pairs", size=8.5)
    _save(figure, path)


def paddings(path: Path) -> None:
    """A 1x1x1 convolution with weight 1 returns its padded input: this is what a convolution sees, though
    nobody stores it."""
    import matplotlib.pyplot as plt

    one, nothing = torch.ones(1, 1, 1, 1, 1), ((0, 0), (0, 0))
    frame = torch.arange(1.0, 13).view(1, 1, 1, 3, 4)
    clip, cache = torch.arange(1.0, 5).view(1, 1, 4, 1, 1), torch.tensor([-2.0, -1.0]).view(1, 1, 2, 1, 1)
    around = {
        mode: vtok_fast.causal_conv3d(
            frame, one, time_pad=(0, 0), spatial_pad=((2, 2), (2, 2)), spatial_mode=mode
        )[0, 0, 0]
        for mode in ("zeros", "replicate", "reflect")
    }
    before = {
        f"time_mode={mode!r}": vtok_fast.causal_conv3d(
            clip, one, time_pad=(3, 0), spatial_pad=nothing, time_mode=mode
        )
        for mode in ("zeros", "replicate", "reflect")
    }
    before["cache of 2 frames, 'zeros'"] = vtok_fast.causal_conv3d(
        clip, one, time_pad=(3, 0), spatial_pad=nothing, cache=cache
    )
    before["cache of 2 frames, 'replicate'"] = vtok_fast.causal_conv3d(
        clip, one, time_pad=(3, 0), spatial_pad=nothing, cache=cache, time_mode="replicate"
    )
    figure = plt.figure(figsize=(10, 4.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(4, 1))
    for (mode, y), ax in zip(around.items(), upper.subplots(1, 3)):
        _cells(ax, y, frame.numel(), f"spatial_mode={mode!r}", (2, 2, 4, 3))
    for (name, y), ax in zip(before.items(), lower.subplots(1, 5)):
        _cells(ax, y.flatten()[None], 4, name, (3, 0, 4, 1))
    _save(figure, path)


def _cells(ax, values: torch.Tensor, largest: int, title: str, box: tuple[int, int, int, int]) -> None:
    from matplotlib.patches import Rectangle

    ax.imshow(
        values.masked_fill(values == 0, torch.nan), cmap="Blues", vmin=-0.6 * largest, vmax=1.6 * largest
    )
    for (row, column), v in zip(
        torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(), values.flatten().tolist()
    ):
        ax.text(
            column,
            row,
            f"{v:.0f}" if v else "0",
            ha="center",
            va="center",
            size=8,
            color="black" if v else "gray",
        )
    ax.add_patch(
        Rectangle(
            (box[0] - 0.5, box[1] - 0.5), box[2], box[3], fill=False, edgecolor="tab:red", linewidth=1.5
        )
    )
    ax.set_title(title, size=9)
    ax.set_axis_off()


def _save(figure, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context({"svg.hashsalt": "vtok_fast", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


PICTURES = {"scopes.svg": scopes, "padding.svg": paddings}


def main(arguments: list[str]) -> int:
    stale = []
    for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]:
        old = page.read_text()
        new = filled(old)
        if new != old:
            stale.append(page)
            if "--check" not in arguments:
                page.write_text(new)
    if "--check" in arguments:
        for page in stale:
            print(f"{page.relative_to(ROOT)}: not what benchmarks/results says; run python scripts/docs.py")
        return bool(stale)
    for name, draw in PICTURES.items():
        draw(DOCS / "pictures" / name)
    return 0


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    sys.exit(main(sys.argv[1:]))
