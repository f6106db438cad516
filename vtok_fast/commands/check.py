"""`vtok-fast check`: each op and a whole VidTok on this machine, against the reference, by the contracts of
`parity`.

Inputs are random but the same every time. Every backend that can run here is asked for by name, so nothing
falls back in silence.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator

import torch

from vtok_fast import parity
from vtok_fast.commands.checks.compare import Outcome, random
from vtok_fast.dispatch.available import available_backends
from vtok_fast.ops import FOLDERS

__all__ = ["Outcome", "checks", "outcomes"]


@functools.cache
def checks() -> dict[str, Callable[[str, str], Iterator[Outcome]]]:
    """How each op's backends are compared with the reference, as the modules of vtok_fast/commands/checks say
    that are named after a folder of vtok_fast/ops."""
    names = (f"vtok_fast.commands.checks.{folder}" for folder in FOLDERS)
    modules = [importlib.import_module(name) for name in names if importlib.util.find_spec(name)]
    return {op: check for module in modules for op, check in module.CHECKS.items()}


def outcomes() -> Iterator[Outcome]:
    """Every comparison, as it is made."""
    for op, backends in available_backends().items():
        for backend, missing in backends.items():
            if backend == "reference":
                continue
            if missing is not None:
                yield Outcome(op, backend, "all", True, skipped=missing)
            elif op in checks():
                yield from checks()[op](op, backend)
    yield from _vidtok()


def _vidtok() -> Iterator[Outcome]:
    """The small VidTok of the package, accelerated as a user would."""
    import vtok_fast
    from vtok_fast.commands.demo import WEIGHTS
    from vtok_fast.models import VidTok

    model = VidTok.from_checkpoint(WEIGHTS).eval()
    video = torch.nn.functional.interpolate(random(1, 3, 3, 6, 6).tanh(), size=(9, 48, 64), mode="trilinear")
    with torch.no_grad():
        eager, double = copy.deepcopy(model), copy.deepcopy(model).double()
        report = vtok_fast.accelerate(model)
        for entry in report.skipped:
            if entry.error is not None:  # it was swapped, and the swap taken back
                yield Outcome("accelerate", "auto", entry.path, False, entry.error, entry.bound, entry.why)
        latents = [
            m.encoder(video.to(d))
            for m, d in ((model, torch.float32), (eager, torch.float32), (double, torch.float64))
        ]
        measured = parity.close(latents[0], latents[2], latents[1])
        yield Outcome("VidTok", "auto", "encoder", measured.ok, measured.error, measured.bound, str(measured))
        tokens = parity.tokens(*latents, model.config.levels)
        yield Outcome("VidTok", "auto", "tokens", tokens.ok, text=str(tokens))
        codes = eager.regularization(latents[1]).codes
        measured = parity.close(model.decoder(codes), double.decoder(codes.double()), eager.decoder(codes))
        yield Outcome("VidTok", "auto", "decoder", measured.ok, measured.error, measured.bound, str(measured))
