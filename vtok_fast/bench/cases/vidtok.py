"""VidTok, encode and decode: the plain PyTorch model beside the accelerated one; on a CPU with and without
the cache of transformed weights, on a GPU beside PyTorch's best arrangement too: ``channels_last_3d``
weights, and ``torch.compile`` of that.

With ``full`` on a CPU also the peak memory of one pass at 17x256x256, each variant in a process of its own
(see vtok_fast/bench/process_memory.py); on a GPU the peak stands beside every time.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.bench import process_memory, products
from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, dtype_name, with_compiled
from vtok_fast.dispatch import native
from vtok_fast.models import VidTok
from vtok_fast.swap import accelerate

PEERS = "eager; on a GPU: channels last; torch.compile(channels last)"


@dataclass(frozen=True)
class Case:
    config: str
    size: tuple[int, int, int]
    memory: bool = False
    model: str = "vidtok"

    def __str__(self) -> str:
        return f"{self.config} {'x'.join(map(str, self.size))}{' memory' if self.memory else ''}"


def cases(settings: Settings) -> list[Case]:
    if settings.quick:
        return [Case("tiny", (9, 64, 64))]
    if settings.on_gpu:
        return [Case("tiny", (17, 256, 256)), Case("fsq_causal_488_32768", (17, 256, 256))]
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


def round_trip(model: VidTok, video: Tensor) -> Tensor:
    return model.decode(model.encode(video))


def build(case: Case, settings: Settings) -> Trial:
    model = moved(make_model(case.config), settings)
    fast = copy.deepcopy(model)
    report = accelerate(fast, check=False)
    video = (torch.rand(1, 3, *case.size, device=settings.device) * 2 - 1).to(settings.working_dtype)
    eager, ours, facts = sides(model, fast, round_trip, (video,), settings)

    tokens, mine = model.encode(video), fast.encode(video)
    decoded, theirs = fast.decode(tokens), model.decode(tokens)
    facts |= {
        "swapped": len(report.swapped),
        "skipped": len(report.skipped),
        "tokens": tokens.indices.numel(),
        "tokens_equal": int((tokens.indices == mine.indices).sum()),
        "decoded_difference": difference(decoded, theirs),
    }
    found, missing = best_arrangements(model, round_trip, (video,), settings) if settings.on_gpu else ([], {})
    return Trial(
        str(case),
        case.config,
        [*eager, *found, *ours],
        facts,
        missing,
        wrong(facts["decoded_difference"], settings),
    )


# ---- what whole models share -------------------------------------------------------------------------------


def sides(
    model: nn.Module, fast: nn.Module, run: Any, inputs: tuple[Tensor, ...], settings: Settings
) -> tuple[list[Candidate], list[Candidate], dict[str, Any]]:
    """The candidates of a model as it ships and of the accelerated one, with ``run(model, *inputs)``; and the
    facts of both."""
    from torch.utils.flop_counter import FlopCounterMode

    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with FlopCounterMode(display=False) as counter:
        run(model, *inputs)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "gflop": counter.get_total_flops() / 1e9,
        "dtype": dtype_name(settings.working_dtype),
        "weight_cache": 0,
        "weight_cache_used": 0,
    }
    eager = [Candidate("eager", partial(run, model), "eager", inputs=inputs)]
    if settings.on_gpu:
        ours = [Candidate("vtok_fast", partial(run, fast), "ours", inputs=inputs)]
        return eager, ours, facts | {"backend": backend_of(ours[0].call)}

    def use_weight_cache(bound: int) -> None:
        if (lib := native.lib()) is not None:
            lib.clear_weight_cache()
            lib.set_weight_cache(bound)
            if bound:
                run(fast, *inputs)

    use_weight_cache(model_bytes)
    facts["done_gflop"] = facts["gflop"] - products.saved_gflop(lambda: run(fast, *inputs))
    ours = [
        Candidate("vtok_fast", partial(run, fast), "ours", partial(use_weight_cache, model_bytes), inputs),
        Candidate(
            "vtok_fast, no weight cache", partial(run, fast), "variant", partial(use_weight_cache, 0), inputs
        ),
    ]
    used = native.lib().weight_cache_stats()["bytes"] if native.lib() else 0
    return (
        eager,
        ours,
        facts | {"weight_cache": model_bytes, "weight_cache_used": used, "backend": backend_of(ours[0].call)},
    )


def moved(model: nn.Module, settings: Settings) -> nn.Module:
    """The model on the device in the dtype of the settings."""
    model = model.to(settings.device)
    return model if settings.working_dtype == torch.float32 else model.to(settings.working_dtype)


def best_arrangements(
    model: nn.Module, run: Any, inputs: tuple[Tensor, ...], settings: Settings
) -> tuple[list[Candidate], dict[str, str]]:
    """PyTorch's own best on a GPU: the weights of 3D convolutions channels last, and that compiled."""
    last = copy.deepcopy(model)
    for module in last.modules():
        if isinstance(module, nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
    candidate = Candidate("channels last", partial(run, last), inputs=inputs)
    found, missing = with_compiled([candidate], settings)
    return [candidate, *found], missing


def difference(mine: Tensor, theirs: Tensor) -> float:
    return ((mine - theirs).norm() / theirs.norm()).item()


def wrong(found: float, settings: Settings) -> str | None:
    """Both results lie within some 1e-5 of the truth in float32, and some 1e-2 in bfloat16; a wrong kernel is
    off by far more."""
    allowed = 1e-3 if settings.working_dtype == torch.float32 else 0.1
    return None if found < allowed else f"the results differ by {found:.1e}"


def memory(case: Case) -> dict[str, Any]:
    """The peak memory of each variant. Raises RuntimeError where the system does not tell."""
    if sys.platform != "linux":
        raise RuntimeError("peak memory is read from /proc")
    names = ("eager", "vtok_fast", "vtok_fast, no weight cache")
    return {
        name: process_memory.measure(variant, case.size, config=case.config, threads=torch.get_num_threads())
        for name, variant in zip(names, process_memory.VARIANTS, strict=True)
    }
