"""``python -m benchmarks``: all of them, with the tables at the end. Results go to
``benchmarks/results/<machine>.json``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vtok_fast.bench import harness, run

NAMES = run.SECTIONS


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time each op beside its strongest peers."
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"one of {', '.join(NAMES)}; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few, small cases and few rounds; no result file unless --json"
    )
    parser.add_argument("--full", action="store_true", help="also peak memory at 17x256x256 (some minutes)")
    parser.add_argument(
        "--json",
        metavar="PATH",
        help="where results go; sections of an existing file are replaced one by one",
    )
    parser.add_argument("--seconds", type=float, metavar="S", help="measure each case for at least S seconds")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads for torch and for the kernels; default: torch's own"
    )
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda or cuda:1; default: a GPU where there is one"
    )
    parser.add_argument(
        "-k",
        metavar="EXPRESSION",
        help="only cases whose name matches, as for pytest; then no result file unless --json",
    )
    options = parser.parse_args()
    options.device = options.device or run.default_device()
    if options.device == "cpu":
        harness.pin_allocator()

    import pytest

    from vtok_fast.bench import machine

    here = Path(__file__).resolve().parent
    results = options.json
    if results is None and not options.quick and not options.k:
        results = str(here / "results" / f"{machine.slug(machine.describe(options.device))}.json")
    arguments = [str(here / f"{name}.py") for name in options.only or NAMES]
    arguments += [
        "-q",
        "--no-header",
        "--benchmark-quiet",
        "-p",
        "no:cacheprovider",
        "--continue-on-collection-errors",
        "--disable-warnings",
        f"--rootdir={here.parent}",
        f"--confcutdir={here}",
    ]
    arguments += [flag for flag, wanted in (("--quick", options.quick), ("--full", options.full)) if wanted]
    for flag, value in (
        ("--device", options.device),
        ("--results", results),
        ("--seconds", options.seconds),
        ("--threads", options.threads),
    ):
        arguments += [] if value is None else [f"{flag}={value}"]
    return pytest.main(arguments + (["-k", options.k] if options.k else []))


if __name__ == "__main__":
    sys.exit(main())
