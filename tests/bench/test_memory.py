"""The peak memory of a case's candidates, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from vtok_fast.bench import case_memory, process_memory, report, run
from vtok_fast.bench.harness import Candidate, Settings

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the system's high-water mark is read from /proc"),
    pytest.mark.volatile,
]
QUICK = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0, compile=False)
MIB = 1 << 20


ARRAYS = """
import json, os, sys, torch
from vtok_fast.bench import case_memory
from vtok_fast.bench.harness import Candidate
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
torch.set_num_threads(1)
def one(mib):
    return torch.ones(mib * (1 << 20) // 4)
def two(mib):
    first = one(mib)
    second = first + 1
    del first
    return second * 2
def three(mib):
    first = one(mib)
    second = first + 1
    return second * 2
cases = json.loads(sys.argv[1])
print(json.dumps([case_memory.of_candidate(Candidate(name, globals()[name], inputs=(mib,)))
                  for name, mib in cases]))
"""
SEVERAL = {"one": 1, "two": 2, "three": 3}  # arrays that are held at a time
GIVEN_BACK = 32  # MiB from which glibc gives an array back when it is freed, whatever was freed before
SMALL_OBJECTS = 30  # of a call: ten for each tensor, which may each lie on a page of its own


def rounding() -> int:
    """Bytes by which a figure of the system can be beyond the sum of what was held.

    An array begins within a page, and so touches one more than it fills; where the system makes pages huge by
    itself, one at either end may reach beyond. Linux counts a process's pages on each CPU, and adds them up
    when a CPU has 32 or twice as many as there are CPUs (lib/percpu_counter.c; before 6.2, a thread has 64):
    on one CPU, each of the two figures of a difference can miss as many.
    """
    page = huge = os.sysconf("SC_PAGE_SIZE")
    transparent = Path("/sys/kernel/mm/transparent_hugepage")
    if transparent.is_dir() and "[always]" in (transparent / "enabled").read_text():
        huge = int((transparent / "hpage_pmd_size").read_text())
    return 3 * 2 * huge + (SMALL_OBJECTS + 2 * max(64, 2 * os.cpu_count())) * page


@pytest.mark.slow
def test_a_peak_is_what_was_held_at_a_time():
    """In a process with the allocator as a user has it: other tests pin theirs, and what is freed then
    stays. What came before does not matter. Of small arrays, the allocator may keep one that was freed."""
    cases = [(name, mib) for mib in (64, 8, 40, 64) for name in SEVERAL]
    command = [sys.executable, "-c", ARRAYS, json.dumps(cases)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert rounding() < GIVEN_BACK * MIB  # one array more or fewer is found
    for (name, mib), peak in zip(cases, json.loads(result.stdout), strict=True):
        held = SEVERAL[name] * mib * MIB
        kept = mib * MIB if name == "two" and mib < GIVEN_BACK else 0
        assert held - rounding() <= peak <= held + kept + rounding(), (name, mib, peak)


def test_inputs_and_warm_caches_do_not_count():
    cache, x = [], torch.ones(32 * MIB // 4)

    def call(x):
        if not cache:
            cache.append(x + 1)
        return x[:10] + cache[0][:10]

    assert case_memory.of_candidate(Candidate("cached", call, inputs=(x,))) < 8 * MIB


def test_every_candidate_of_a_case_is_measured_in_another_process(monkeypatch):
    chosen = run.choose(["token_packing"], QUICK, match="unpack")[:1]
    monkeypatch.setattr(process_memory, "settled", lambda: pytest.fail("measured in this process"))
    wish = Settings(**{**QUICK.__dict__, "memory": True})
    results = run.run(chosen, wish, say=lambda line: None)
    (record,) = results["sections"]["token_packing"]["cases"]
    assert (
        all(entry["peak_bytes"] >= 0 for entry in record["seconds"].values()) and len(record["seconds"]) > 1
    )
    assert (
        "peak_bytes"
        not in run.run(chosen, QUICK, say=lambda line: None)["sections"]["token_packing"]["cases"][0][
            "seconds"
        ][record["ours"]]
    )
    report.show(results)


@dataclass(frozen=True)
class Unknown:
    def __str__(self):
        return "unknown"


def test_a_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="measuring the memory of unknown: "):
        case_memory.of_case("sora", Unknown(), QUICK)
