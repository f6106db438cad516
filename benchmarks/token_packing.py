"""``token_packing`` under pytest-benchmark. vtok_fast/bench/cases/token_packing.py says what is compared."""

from vtok_fast.bench.cases.token_packing import build, cases  # noqa: F401


def test_token_packing(case, run_trial) -> None:
    run_trial(case)
