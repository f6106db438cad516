"""The peak memory of a case's candidates, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from vtok_fast.bench import case_memory, process_memory, report, run
from vtok_fast.bench.harness import Candidate, Settings

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the system's high-water mark is read from /proc"
)
QUICK = Settings(quick=True, min_rounds=3, min_seconds=0.0, max_seconds=1.0, compile=False)
MIB = 1 << 20


CHAINS = """
import json, torch
from vtok_fast.bench import case_memory
from vtok_fast.bench.harness import Candidate
def chain(mib):
    first = torch.ones(mib * (1 << 20) // 4)
    second = first + 1
    del first
    return second * 2
candidates = [Candidate(str(mib), chain, inputs=(mib,)) for mib in (64, 8, 64)]
print(json.dumps([case_memory.of_candidate(candidate) for candidate in candidates]))
"""


def test_a_peak_is_what_was_held_at_a_time():
    """In a process with the allocator as a user has it: other tests pin theirs, and what is freed then
    stays."""
    result = subprocess.run([sys.executable, "-c", CHAINS], capture_output=True, text=True, check=True)
    peaks = json.loads(result.stdout)
    for peak, mib in zip(peaks, (64, 8, 64)):  # two at a time; what came before does not matter
        assert 0.95 * 2 * mib <= peak / MIB <= 2 * mib + 8, peaks


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
