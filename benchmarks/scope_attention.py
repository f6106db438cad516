"""``scope_attention`` under pytest-benchmark. vtok_fast/bench/cases/scope_attention.py says what is
compared."""

from vtok_fast.bench.cases.scope_attention import build, cases  # noqa: F401


def test_scope_attention(case, run_trial) -> None:
    run_trial(case)
