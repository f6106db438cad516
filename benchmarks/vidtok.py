"""``vidtok`` under pytest-benchmark. vtok_fast/bench/cases/vidtok.py says what is compared."""

from vtok_fast.bench.cases.vidtok import build, cases, memory  # noqa: F401


def test_vidtok(case, run_trial) -> None:
    run_trial(case)
