"""``models`` under pytest-benchmark. vtok_fast/bench/cases/models.py says what is compared."""

from vtok_fast.bench.cases.models import build, cases, memory  # noqa: F401


def test_models(case, run_trial) -> None:
    run_trial(case)
