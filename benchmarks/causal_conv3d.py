"""``causal_conv3d`` under pytest-benchmark. vtok_fast/bench/cases/causal_conv3d.py says what is compared."""

from vtok_fast.bench.cases.causal_conv3d import build, cases  # noqa: F401


def test_causal_conv3d(case, run_trial) -> None:
    run_trial(case)
