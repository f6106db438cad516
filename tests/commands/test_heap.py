"""The commands' heap: what is freed is used again, without new pages from the system."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
import numpy as np
from resource import RUSAGE_SELF, getrusage
from vtok_fast.commands.heap import keep_freed_memory

keeps = keep_freed_memory() if sys.argv[1] == "keep" else None
counts = []
for _ in range(3):
    before = getrusage(RUSAGE_SELF).ru_minflt
    np.full(1 << 28, 7, np.uint8)
    counts.append(getrusage(RUSAGE_SELF).ru_minflt - before)
print(keeps, *counts)
"""


def faults(how: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.volatile
@pytest.mark.slow
def test_freed_memory_is_used_again():
    keeps, first, *later = faults("keep")
    if keeps == "False":
        pytest.skip("not glibc")
    again = max(1, *map(int, later))
    assert int(first) > 20 * again
    _, *usual = faults("leave")  # what it saves: the system makes all pages anew, at most of 2 MiB
    assert min(map(int, usual)) > 20 * again
