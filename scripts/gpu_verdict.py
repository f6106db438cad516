"""One page on what scripts/gpu_check.sh found: every step with its tests, the loops of the Hopper convolution
beside their prediction, and what to do first.

    python scripts/gpu_verdict.py build/gpu_check
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MHZ = 1750  # of an H200 under load, as in the predictions
FIRST = {
    "build": "nothing else has run: see build.log",
    "conformance": "an instruction does not do what the emulator says; all other failures may follow from it",
    "memcheck": "memory: see memcheck.log for the kernel and the address",
    "host": "contexts, grants, devices or graphs: csrc/cuda/launch.cuh",
    "loops": "the Hopper loop",
    "tests": "see tests.log",
}


def tests(file: Path) -> tuple[str, list[str]]:
    """The counts of a junit file, and its failures."""
    if not file.exists():
        return "", []
    suites = list(ElementTree.parse(file).getroot().iter("testsuite"))
    count = {
        key: sum(int(s.get(key, 0)) for s in suites) for key in ("tests", "failures", "errors", "skipped")
    }
    bad = [
        f"{case.get('classname')}::{case.get('name')}: {(part.get('message') or '').splitlines()[:1]}"
        for case in (c for s in suites for c in s.iter("testcase"))
        for part in (*case.findall("failure"), *case.findall("error"))
    ]
    ran = count["tests"] - count["skipped"]
    wrong = count["failures"] + count["errors"]
    return f"{ran - wrong} passed, {wrong} failed, {count['skipped']} skipped", bad


def loops(file: Path) -> list[str]:
    if not file.exists():
        return []
    lines = ["", f"{'tile':<10}{'build':<10}{'us':>9}{'TFLOP/s':>9}{'predicted us':>14}"]
    lines += [
        f"{r['tile']:<10}{r['module']:<10}{r['us']:>9.1f}{r['tflops']:>9.0f}"
        f"{r['predicted_cycles'] / MHZ:>14.1f}"
        for r in json.loads(file.read_text())
    ]
    return lines


def verdict(out: Path) -> str:
    lines, wrong, skipped_all, failures = [], [], [], []
    for line in (out / "steps.tsv").read_text().splitlines():
        name, status, took = line.split("\t")
        counts, bad = tests(out / f"{name}.xml")
        failures += bad
        word = "ok" if status == "0" else status if not status.isdigit() else f"FAILED ({status})"
        if status in ("124", "137"):
            word = f"HUNG ({status})"
        if status.isdigit() and status != "0":
            wrong.append(name)
        if counts.startswith("0 passed, 0 failed"):
            skipped_all.append(name)
        lines.append(f"{name:<22}{word:<14}{took:>5} s  {counts}")
    lines += loops(out / "loops.json")
    if failures:
        lines += ["", *(f"- {text[:150]}" for text in failures[:12])]
        lines += [f"- and {len(failures) - 12} more"] if len(failures) > 12 else []
    lines.append("")
    if skipped_all:
        lines.append(f"NOTHING RAN in {', '.join(skipped_all)}: every test was skipped.")
    if wrong:
        lines.append(f"FIRST: {wrong[0]}: {FIRST.get(wrong[0], f'see {wrong[0]}.log')}.")
    lines.append("VERDICT: " + ("not sound" if wrong else "incomplete" if skipped_all else "sound"))
    return "\n".join(lines)


def main(folder: str) -> None:
    text = verdict(Path(folder))
    (Path(folder) / "verdict.txt").write_text(text + "\n")
    print("\n" + text)


if __name__ == "__main__":
    main(*sys.argv[1:])
