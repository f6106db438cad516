"""Peak memory of a case's candidates on a CPU: ``vtok-fast bench --memory``.

A process of its own, with the allocator as a user has it, builds the case and calls each candidate twice. The
figure is of the second call: the most that was resident, its result included, beyond what was before it,
inputs and warm caches among that. So it counts what torch allocates and what the native module does.
"""

from __future__ import annotations

import base64
import json
import pickle
import sys
from typing import Any

import torch

from vtok_fast.bench import process_memory
from vtok_fast.bench.harness import Candidate, Settings


def of_case(section: str, case: Any, settings: Settings) -> dict[str, float]:
    """Bytes by the name of a candidate. Raises RuntimeError where the process fails, as where there is no
    Linux to tell."""
    job = base64.b85encode(pickle.dumps((section, case, settings, torch.get_num_threads()))).decode()
    return process_memory.in_process(
        "vtok_fast.bench.case_memory", {"variant": str(case), "job": job}, weight_cache=True
    )


@torch.no_grad()
def of_candidate(candidate: Candidate) -> int:
    if candidate.prepare:
        candidate.prepare()
    candidate.call()
    before = process_memory.settled()
    result = candidate.call()
    peak = process_memory.highest() - before
    del result
    return peak


def _measure(task: dict[str, Any]) -> dict[str, float]:
    from vtok_fast.bench.sections import section

    name, case, settings, threads = pickle.loads(base64.b85decode(task["job"]))  # what of_case made
    torch.set_num_threads(threads)
    return {c.name: of_candidate(c) for c in section(name).build(case, settings).candidates}


if __name__ == "__main__":
    print(json.dumps(_measure(json.loads(sys.argv[1]))))
