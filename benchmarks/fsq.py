"""``fsq`` under pytest-benchmark. vtok_fast/bench/cases/fsq.py says what is compared."""

from vtok_fast.bench.cases.fsq import build, cases  # noqa: F401


def test_fsq(case, run_trial) -> None:
    run_trial(case)
