"""Every case of ``vtok-fast bench`` under pytest-benchmark: ``pytest benchmarks --benchmark-autosave``.

``--benchmark-compare`` then compares two commits on one machine; ``-k "fsq and latent"`` chooses cases.
"""


def test_case(section, case, run_trial) -> None:
    run_trial(section, case)
