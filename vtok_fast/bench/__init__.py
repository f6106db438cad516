"""Benchmarks: each op beside its strongest peers, in one run. The command is ``vtok-fast bench``
(vtok_fast/commands/bench.py).

Each file in cases/ says what is compared: ``cases(settings)``, ``build(case, settings)``, which makes a
trial, ``own(wish)``, which makes a case from the user's own shapes, and ``PEERS``. The rest is the machinery:
sections.py (the list of cases/), run.py (chooses and runs them), harness.py (taking turns, ratios), timers.py
(one sample, on a CPU or a GPU), process_memory.py and case_memory.py (peak memory in a process of its own),
ceilings.py (the most that the machine can do), machine.py (what is recorded about it), report.py, compare.py
and picture.py.
"""
