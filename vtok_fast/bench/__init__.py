"""Benchmarks: each op beside its strongest peers, in one run. ``vtok-fast bench``, and in a clone of the
source ``python -m benchmarks``, which runs the same under pytest-benchmark.

One file per op says what is compared: ``cases(settings)``, ``build(case, settings)`` which makes a trial,
``own(wish)`` which makes a case of the user's own shapes, and ``PEERS``. Beside them harness.py (taking
turns, ratios), timers.py (one sample, on a CPU and on a GPU), ceilings.py (what the machine can do at the
most), machine.py (what is recorded of it), run.py, report.py, compare.py and picture.py.
"""
