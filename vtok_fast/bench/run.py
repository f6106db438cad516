"""Which cases run, and running them. Importing this needs torch."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vtok_fast.bench import case_memory, ceilings, harness, machine, report
from vtok_fast.bench.harness import Settings
from vtok_fast.bench.own import Own
from vtok_fast.bench.sections import OPS, SECTIONS, section

Chosen = list[tuple[str, Any]]  # sections with cases


def choose(
    names: Sequence[str],
    settings: Settings,
    *,
    model: str | None = None,
    match: str | None = None,
    wish: Own | None = None,
) -> Chosen:
    """The cases to run.

    Args:
        names: sections; none: all of them.
        model: only workloads of this model, by the start of its name: ``vidtok``, ``wan2.1``, ``cosmos``,
            ``tivtok``, ...
        match: only cases whose section and name have all of these words.
        wish: instead of the built-in cases one of the user's own, for the single op in ``names``.

    Raises:
        ValueError: an unknown section, no case is left, or an option of ``wish`` does not fit the op.
    """
    if wish is not None:
        if len(names) != 1 or names[0] not in OPS:
            raise ValueError(
                f"op: own shapes need one op, of {', '.join(OPS)}, got {', '.join(names) or 'none'}"
            )
        return [(names[0], section(names[0]).own(wish))]
    chosen = [(name, case) for name in names or SECTIONS for case in section(name).cases(settings)]
    if model is not None:
        chosen = [(name, case) for name, case in chosen if _plain(case.model).startswith(_plain(model))]
    for word in (match or "").lower().split():
        chosen = [(name, case) for name, case in chosen if word in f"{name} {case}".lower()]
    if not chosen:
        known = sorted(
            {case.model for name in SECTIONS for case in section(name).cases(settings)}, key=str.lower
        )
        raise ValueError(
            f"bench: no case has model={model!r} and match={match!r}; the models are {', '.join(known)}"
        )
    return chosen


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def listing(chosen: Chosen, settings: Settings) -> list[dict[str, Any]]:
    """What would run, without making any tensor."""
    return [
        {
            "section": name,
            "case": str(case),
            "model": case.model,
            "device": settings.device,
            "dtype": harness.dtype_name(getattr(case, "dtype", None) or settings.working_dtype),
            "peers": section(name).PEERS,
        }
        for name, case in chosen
    ]


def run(
    chosen: Chosen,
    settings: Settings,
    *,
    file: str | os.PathLike | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures the ceilings, then every case; what fails is noted and the rest goes on.

    Returns and, after every case, writes to ``file`` the results as `vtok_fast.bench.report.save` does.
    """
    prepare(settings)
    here, sections = machine.describe(settings.device), {}
    limits = ceilings.measure(settings)
    say(ceilings.line(limits))
    for name, case in chosen:
        of_memory = getattr(case, "memory", False)
        kept = sections.setdefault("memory" if of_memory else name, new_section(settings, limits))
        try:
            record = (
                {"case": str(case), "variants": section(name).memory(case)}
                if of_memory
                else measure(name, case, settings, limits)
            )
        except (harness.Missing, RuntimeError, MemoryError) as error:  # out of memory, most of the time
            kept["failed"][str(case)] = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            say(f"{name}: {case}: not measured: {kept['failed'][str(case)]}")
        else:
            kept["cases"].append(record)
            say(report.line(name, record) + (f" WRONG: {record['wrong']}" if record.get("wrong") else ""))
        if settings.on_gpu:
            torch.cuda.empty_cache()
        if file is not None:
            report.save(file, here, sections)
    return {"version": report.VERSION, "machine": here, "sections": sections}


def prepare(settings: Settings) -> None:
    """What the peers deserve: on a GPU cuDNN looks for its fastest algorithm."""
    if settings.on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.cuda.set_device(torch.device(settings.device).index or 0)


def new_section(settings: Settings, limits: dict[str, Any] | None) -> dict[str, Any]:
    return machine.state(settings.device) | {
        "quick": settings.quick,
        "ceilings": limits,
        "failed": {},
        "cases": [],
    }


@torch.no_grad()
def measure(name: str, case: Any, settings: Settings, limits: dict[str, Any] | None) -> dict[str, Any]:
    """The record of one case. Raises Missing where it cannot run here."""
    record = harness.measure(section(name).build(case, settings), settings, limits)
    if settings.memory and not settings.on_gpu:  # on a GPU it stands there already
        for candidate, peak in case_memory.of_case(name, case, settings).items():
            record["seconds"][candidate]["peak_bytes"] = peak
    return record | ({"clocks": machine.clocks(settings.device)} if settings.on_gpu else {})
