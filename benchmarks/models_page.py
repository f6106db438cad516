"""``python -m benchmarks.models_page``: writes ``docs/models.md``, what is swapped in each listed model and
what was measured.

What is swapped comes from small models with the structure of the listed ones; times and memory from the
result files in ``benchmarks/results`` (or those given as arguments) that have measured models.
"""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vtok_fast import stream
from vtok_fast.bench import report
from vtok_fast.bench.cases.models import MODELS, VARIANTS, Model
from vtok_fast.swap import accelerated
from vtok_fast.swap.record import Entry

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "models.md"
INTRODUCTION = """# Models of other libraries

`vtok_fast.accelerate(model)` swaps the modules below in place, checks each swap against float64, and takes
everything back with `report.revert()`. The contract *close* allows at most twice the error of PyTorch's own
code (see `vtok_fast/parity.py`); `accelerate(model, contract="exact")` removes only copies that do nothing,
and every result is bit-equal. Any other model is handled by the general rule: `nn.Conv1d`, `nn.Conv2d`,
`nn.Conv3d`, modules that pad and then convolve, which are recognized by running them, and norms.

The adapter for LTX Video is also that of `AutoencoderKLLTX2Video`, the one for `AutoencoderKL` that of
models of the same blocks (`AutoencoderKLFlux2`, `AutoencoderKLTemporalDecoder`, `VQModel`), and one serves
`AutoencoderKLHunyuanVideo15` and `AutoencoderKLHunyuanImageRefiner`; `AutoencoderKLMochi` has its own. Those
are too large, or too similar, to be listed.

This page is written by `python -m benchmarks.models_page`; `vtok-fast bench models --full` measures.
"""


def first_paragraph(documented: Any) -> str:
    """What its docstring says first, on one line."""
    return " ".join(inspect.getdoc(documented).split("\n\n")[0].split())


def main(paths: Iterable[str]) -> None:
    files = [Path(p) for p in paths] or sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    PAGE.write_text(page([r for r in map(report.load, files) if "models" in r["sections"]]))
    print(f"written to {PAGE}")


def page(results: list[dict[str, Any]]) -> str:
    """The whole page, from the results of some machines."""
    parts = [INTRODUCTION, *map(measured, results)]
    if not results:
        parts.append("No result file has measured models yet.\n")
    return "\n".join(parts + [section(name, model) for name, model in MODELS.items()])


def measured(results: dict[str, Any]) -> str:
    """The table of one machine: times faster than as shipped, with the quartiles of the rounds, and peak
    memory as a share."""
    sections = results["sections"]
    state, rows = sections["models"], []
    memory = {
        c["case"].removesuffix(" memory").rpartition(" ")[0]: report.memory_ratios(c)
        for c in sections.get("memory", {"cases": []})["cases"]
    }
    for case in state["cases"]:
        ratios = [report.ratio(case, "eager", name) for name in VARIANTS[1:]]
        shares = [memory.get(case["group"], {}).get(name) for name in VARIANTS[1:]]
        cells = [case["case"], *map(_spread, ratios), *("–" if s is None else f"{s:.2f}" for s in shares)]
        rows.append(f"| {' | '.join(cells)} | {case['facts']['difference']:.1e} |")
    return "\n".join(
        [
            f"## Measured: {results['machine']['cpu']}, {state['threads']} threads, torch {state['torch']}, "
            f"commit {state['commit']}",
            "",
            "One encode and one decode in float32, against the model as shipped, at the class's own widths "
            "and random weights. Memory: "
            "the peak beyond the loaded model as a share of the shipped model's, of 5 (VidTok: 8) frames of "
            "256x256.",
            "",
            "| model and video | times faster | without weight cache | peak memory | without weight cache | "
            "difference |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _spread(r: dict[str, float] | None) -> str:
    return "–" if r is None else f"{r['median']:.2f} ({r['q1']:.2f} to {r['q3']:.2f})"


def section(name: str, listed: Model) -> str:
    """What is done to one model."""
    lines = [f"## {name}: `{listed.library}.{listed.name}`", ""]
    try:
        model = listed.make(small=True)
    except ImportError as error:
        return "\n".join([*lines, f"Not looked at: {error}.", ""])
    with accelerated(model) as done:
        swapped, skipped, failed = done.swapped, done.skipped, [e for e in done.skipped if "failed" in e.why]
    with accelerated(model, contract="exact") as done:
        exact = Counter(e.kind for e in done.swapped)
    lines += ["| class | count | now | under *exact* |", "|---|---|---|---|"]
    lines += [
        f"| `{kind}` | {n} | {what} | {exact[kind] or '–'} |" for (kind, what), n in _count(swapped, "what")
    ]
    for kind in exact.keys() - {e.kind for e in swapped}:
        lines.append(f"| `{kind}` | – | (part of a larger swap) | {exact[kind]} |")
    lines += ["", "Counts are those of a small model of the same structure.", ""]
    if skipped:
        lines += [
            "Left alone: "
            + "; ".join(f"{n} `{kind}` ({why})" for (kind, why), n in _count(skipped, "why"))
            + ".",
            "",
        ]
    if failed:
        lines += [f"**{len(failed)} swaps failed their contract here and were undone.**", ""]
    try:
        lines += [f"`vtok_fast.stream(model)`: {first_paragraph(type(stream(model)))}", ""]
    except TypeError as error:
        lines += [f"`vtok_fast.stream(model)`: {str(error).removeprefix('model: ')}.", ""]
    return "\n".join(lines)


def _count(entries: list[Entry], field: str) -> list[tuple[tuple[str, str], int]]:
    return sorted(Counter((e.kind, getattr(e, field)) for e in entries).items())


if __name__ == "__main__":
    with torch.no_grad():
        main(sys.argv[1:])
