"""VidTok, encode and decode: the plain PyTorch model beside the accelerated one, with and without the cache of transformed weights.

With ``--full`` also the peak memory of one pass at 17x256x256, each variant in a process of its own (see vtok_fast/peak_memory.py).
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from benchmarks.harness import Candidate, Settings, Trial
from vtok_fast import native, peak_memory
from vtok_fast.models import VidTok
from vtok_fast.swap import accelerate


@dataclass(frozen=True)
class Case:
    config: str
    size: tuple[int, int, int]
    memory: bool = False

    def __str__(self) -> str:
        return f"{self.config} {'x'.join(map(str, self.size))}{' memory' if self.memory else ''}"


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [Case("tiny", (9, 64, 64))]
    chosen = [Case("tiny", (17, 128, 128)), Case("fsq_causal_488_32768", (17, 96, 96))]
    return chosen + [Case("fsq_causal_488_32768", (17, 256, 256), memory=True)] if settings.full else chosen


def make_model(config: str) -> VidTok:
    """A model with random weights, also where training starts from zeros."""
    torch.manual_seed(0)
    model = VidTok(config).eval()
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)
    return model.requires_grad_(False)


def build(case: Case, settings: Settings) -> Trial:
    model = make_model(case.config)
    fast = copy.deepcopy(model)
    report = accelerate(fast, check=False)
    video = torch.rand(1, 3, *case.size) * 2 - 1
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())

    def round_trip(m: VidTok) -> torch.Tensor:
        return m.decode(m.encode(video))

    def use_weight_cache(bound: int) -> None:
        if (lib := native.lib()) is not None:
            lib.clear_weight_cache()
            lib.set_weight_cache(bound)
            if bound:
                round_trip(fast)

    use_weight_cache(model_bytes)
    tokens, mine = model.encode(video), fast.encode(video)
    ours, theirs = fast.decode(tokens), model.decode(tokens)
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "swapped": len(report.swapped), "skipped": len(report.skipped),
             "tokens": tokens.indices.numel(), "tokens_equal": int((tokens.indices == mine.indices).sum()),
             "decoded_difference": ((ours - theirs).norm() / theirs.norm()).item(), "weight_cache": model_bytes,
             "weight_cache_used": native.lib().weight_cache_stats()["bytes"] if native.lib() else 0}
    candidates = [Candidate("eager", partial(round_trip, model), "eager"),
                  Candidate("vtok_fast", partial(round_trip, fast), "ours", partial(use_weight_cache, model_bytes)),
                  Candidate("vtok_fast, no weight cache", partial(round_trip, fast), "variant", partial(use_weight_cache, 0))]
    # Both results lie within some 1e-5 of the truth; a wrong kernel is off by far more.
    difference = facts["decoded_difference"]
    return Trial(str(case), case.config, candidates, facts,
                 wrong=None if difference < 1e-3 else f"the decoded videos differ by {difference:.1e}")


def test_vidtok(case: Case, run_trial, keep) -> None:
    if not case.memory:
        run_trial(case)
        return
    if sys.platform != "linux":
        pytest.skip("peak memory is read from /proc")
    names = ("eager", "vtok_fast", "vtok_fast, no weight cache")
    variants = {name: peak_memory.measure(variant, case.size, config=case.config, threads=torch.get_num_threads())
                for name, variant in zip(names, peak_memory.VARIANTS, strict=True)}
    keep("memory", {"case": str(case), "variants": variants})
