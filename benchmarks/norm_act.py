"""``norm_act`` under pytest-benchmark. vtok_fast/bench/cases/norm_act.py says what is compared."""

from vtok_fast.bench.cases.norm_act import build, cases  # noqa: F401


def test_norm_act(case, run_trial) -> None:
    run_trial(case)
