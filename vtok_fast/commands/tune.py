"""``vtok-fast tune``: measures the ways to run a model's layers, or an op's workloads, on this machine and
writes those that win into its table.

The model runs once, and every class of its calls is then measured, the candidates taking turns. Convolutions,
on random data: on a CPU each algorithm and PyTorch; on a GPU the tiles of the sm80 kernel, those of the
Hopper kernel that its model predicts to be within twice its best, and PyTorch. Triton kernels (attention,
norms, packing), only on a GPU: their tiles, by tune_triton.py. A candidate must compute what the reference
does, or the built-in tile, and beat what the dispatcher would do untuned by 3 % in the quartiles of the
rounds; else the class is left out of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench import harness, machine
from vtok_fast.bench.cases import models, vidtok
from vtok_fast.bench.harness import Candidate, Settings
from vtok_fast.bench.sections import OPS, section
from vtok_fast.commands import tune_triton
from vtok_fast.dispatch import backends, tuning
from vtok_fast.ops.causal_conv3d import sm80, sm90, tuned
from vtok_fast.ops.causal_conv3d.call import ConvCall

LEAST_GAIN = 1.03
SM80_TILES = ((256, 128), (256, 96), (128, 128), (128, 64), (128, 32))
SM90_TILES = ((256, 160), (256, 128), (256, 96), (128, 144), (128, 128), (128, 112), (128, 96), (128, 64))
Way = tuple[str, Any]  # a backend, and the choice that it is told
Entries = dict[str, dict[str, tuning.Entry | None]]  # by op and class; None: as good untuned


# ---- the calls of a model ----------------------------------------------------------------------------------


def load(
    name: str, settings: Settings
) -> tuple[torch.nn.Module, Callable[[torch.nn.Module, Tensor], Any], list[int]]:
    """An accelerated model with random weights, how it runs, and the size of its smallest video (T, H, W).

    ``vidtok/CONFIG``, or a name of the models of other libraries, as ``Wan 2.1``. Raises ValueError for
    another.
    """
    from vtok_fast.models.vidtok.config import CONFIGS
    from vtok_fast.swap import accelerate

    system, _, config = name.partition("/")
    if system == "vidtok" and config in CONFIGS:
        model, run, size = vidtok.make_model(config), vidtok.round_trip, [17, 64, 64]
    elif name in models.MODELS:
        listed = models.MODELS[name]
        model, run, size = listed.make(), models.round_trip, [listed.frames, listed.smallest, listed.smallest]
    else:
        known = [*(f"vidtok/{config}" for config in CONFIGS), *models.MODELS, *OPS]
        raise ValueError(f"model={name!r}: expected one of {', '.join(known)}")
    model = vidtok.moved(model, settings)
    accelerate(model, check=False)
    return model, run, size


def workloads(op: str, settings: Settings) -> Iterator[Callable[[], Any]]:
    """The calls of an op that ``vtok-fast bench`` times, those of other models than there are libraries left
    out."""
    bench = section(op)
    for case in bench.cases(settings):
        try:
            yield bench.build(case, replace(settings, compile=False)).ours.call
        except harness.Missing:
            continue


@torch.no_grad()
def calls_of(run: Callable[[], Any]) -> dict[str, ConvCall]:
    """One call of each class of convolutions within ``run()``, its tensors on the meta device."""
    found: dict[str, ConvCall] = {}

    def note(name: str, call: Any, _: backends.Backend) -> None:
        plain = (
            name == "causal_conv3d"
            and call.geometry.groups == 1
            and call.geometry.dilation == (1, 1, 1)
            and call.geometry.upsample == (1, 1, 1)
        )
        if plain and (key := tuned.tuning_class(call)) not in found:
            found[key] = call._replace(
                **{n: _empty(t, "meta") for n, t in call._asdict().items() if isinstance(t, Tensor)}
            )

    with harness.selections(note):
        run()
    return found


def _empty(tensor: Tensor, device: str) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


# ---- the candidates ----------------------------------------------------------------------------------------


def ways(call: ConvCall) -> Iterator[Way]:
    """Every way to run a call on its device, those that cannot among them."""
    if call.x.device.type == "cpu":
        plane = call.weight.shape[3:] == (3, 3) and call.geometry.stride[1:] == (1, 1)
        yield from (("cpu", name) for name in ("direct", "winograd2", "winograd4")[: 3 if plane else 1])
    else:
        yield from (("sm80", (*tile, splits)) for tile in SM80_TILES for splits in (0, 1, 2, 4))
        yield from (("sm90", choice) for choice in hopper_choices(call))
    yield "reference", None


def hopper_choices(call: ConvCall) -> list[sm90.Choice]:
    """The Hopper kernel's plans whose predicted cycles are at most twice the fewest; none where it cannot run
    the call."""
    out = call.empty_output(device="meta")
    plans = {}
    if sm90.why_not(call) is not None:
        return []
    for rows, columns in SM90_TILES:
        for cluster in (1, 2):
            for splits in (1, 2, 4):
                try:
                    plan = sm90.plan(call, out, choice=(rows, columns, splits, cluster, 0))
                except NotImplementedError:
                    continue
                plans[plan.choice] = plan.cycles
    return [choice for choice, cycles in plans.items() if cycles <= 2 * min(plans.values())]


def execute(call: ConvCall, way: Way | None, *tensors: Tensor | None) -> Tensor:
    """Runs a call on these tensors in one way; None: as the dispatcher does without a table."""
    call = call._replace(**dict(zip(("x", "weight", "bias", "cache", "residual"), tensors)))
    if way is None:
        return backends.select("causal_conv3d", call).run(call)
    backend, choice = way
    if backend == "cpu":
        with backends.algorithm(choice):
            return backends.select("causal_conv3d", call, "cpu").run(call)
    chosen = backends.select("causal_conv3d", call, backend)
    if backend == "reference":
        return chosen.run(call)
    out = call.empty_output()
    return (sm90 if backend == "sm90" else sm80).forward(call, out, choice=choice)


# ---- measuring ---------------------------------------------------------------------------------------------


def race(
    candidates: Sequence[Candidate], left_out: dict[str, str], settings: Settings
) -> tuple[Candidate | None, dict[str, Any]]:
    """Which of them beats the first one, "untuned", and by enough; and what was measured."""
    seconds, _ = harness.interleave(candidates, settings)
    medians = {name: harness.spread(s)["median"] for name, s in seconds.items()}
    gains = {c.name: harness.ratios(seconds, c.name)["untuned"] for c in candidates[1:]}
    best = min(candidates[1:], key=lambda c: medians[c.name], default=None)
    if best is not None and gains[best.name]["q1"] < LEAST_GAIN:
        best = None
    facts = {
        "best": best.name if best else "untuned",
        "microseconds": {n: round(s * 1e6, 2) for n, s in medians.items()},
        "left_out": left_out,
        "gain": round(gains[best.name]["median"], 3) if best else 1.0,
    }
    return best, facts


def _entry(facts: dict[str, Any], **choice: Any) -> tuning.Entry:
    times = facts["microseconds"]
    return choice | {
        "measured_us": times[facts["best"]],
        "untuned_us": times["untuned"],
        "gain": facts["gain"],
    }


@torch.no_grad()
def measure(call: ConvCall, settings: Settings) -> tuple[tuning.Entry | None, dict[str, Any]]:
    """The entry of the table for a convolution's class, None where untuned is as good; and what was
    measured."""
    torch.manual_seed(0)
    tensors = tuple(None if t is None else _empty(t, settings.device).normal_() for t in call[:5])
    tensors = (tensors[0], tensors[1] / call.weight[0].numel() ** 0.5, *tensors[2:])
    call = call._replace(**dict(zip(("x", "weight", "bias", "cache", "residual"), tensors)))
    enabled, tuning._enabled = tuning._enabled, False
    try:
        want = execute(call, ("reference", None), *tensors)
        candidates, left_out = (
            [Candidate("untuned", partial(execute, call, None), "ours", inputs=tensors)],
            {},
        )
        for way in ways(call):
            name = f"{way[0]} {way[1]}" if way[1] is not None else way[0]
            try:
                got = execute(call, way, *tensors)
            except (NotImplementedError, RuntimeError, ValueError) as error:
                left_out[name] = str(error).strip().splitlines()[0]
                continue
            if (got.double() - want.double()).norm() > 2 * parity.floor(want.dtype) * want.double().norm():
                left_out[name] = "another result than the reference's"
            else:
                candidates.append(Candidate(name, partial(execute, call, way), "variant", inputs=tensors))
        best, facts = race(candidates, left_out, settings)
    finally:
        tuning._enabled = enabled
    if best is None:
        return None, facts
    backend, choice = best.function.args[1]
    return _entry(facts, backend=backend, choice=choice), facts


@torch.no_grad()
def measure_launch(
    of: tune_triton.Class, launch: tune_triton.Launch, settings: Settings
) -> tuple[tuning.Entry | None, dict[str, Any]]:
    """The same for a class of Triton launches."""
    best, facts = race(*tune_triton.candidates(of, launch), settings)
    return None if best is None else _entry(facts, choice=list(best.function.args[2])), facts


def _line(key: str, facts: dict[str, Any]) -> str:
    best, times = facts["best"], facts["microseconds"]
    found = (
        ", as good as any"
        if best == "untuned"
        else f"; {best} {times[best]:.1f} us, {facts['gain']:.2f} times faster"
    )
    return f"{key}: untuned {times['untuned']:.1f} us{found}"


def tune(
    run: Callable[[], Any], entries: Entries, settings: Settings, dry_run: bool, say: Callable[[str], None]
) -> None:
    """Adds the entries of the classes that occur within ``run()`` and are not there yet; None for those that
    are as good untuned, which `vtok_fast.dispatch.tuning.save` takes out."""
    found: list[tuple[str, str, Callable[[], Any]]] = []
    for key, call in calls_of(run).items():
        found.append(("causal_conv3d", key, partial(measure, call, settings)))
    for (name, key), launch in (tune_triton.launches_of(run) if settings.on_gpu else {}).items():
        found.append((name, key, partial(measure_launch, (name, key), launch, settings)))
    for name, key, measured in found:
        if key not in entries.setdefault(name, {}):
            entries[name][key], facts = (None, None) if dry_run else measured()
            if facts:
                say(_line(key, facts))


def run(
    name: str,
    settings: Settings,
    *,
    size: tuple[int, int, int] | None = None,
    output: Any = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Tunes a model's layers for videos of (T, H, W), or an op for its workloads, and saves the table;
    ``dry_run`` only finds the classes."""
    device = torch.device(settings.device)
    if name in OPS:
        runs, size = workloads(name, settings), None
    else:
        model, forward, smallest = load(name, settings)
        size = size or (tuple(smallest) if settings.quick or not settings.on_gpu else (smallest[0], 256, 256))
        video = (torch.rand(1, 3, *size, device=device) * 2 - 1).to(settings.working_dtype)
        runs = iter([partial(forward, model, video)])
    entries: Entries = {}
    for each in runs:
        tune(each, entries, settings, dry_run, say)
    path = output or tuning.folder() / f"{tuning.machine(device)}.json"
    result = {
        "model": name,
        "size": None if size is None else list(size),
        "file": str(path),
        "classes": {op: list(found) for op, found in entries.items()},
    }
    if dry_run:
        return result
    state = (
        machine.state(settings.device)
        | {"model": name, "size": result["size"]}
        | (machine.clocks(settings.device) if settings.on_gpu else {})
    )
    tuning.save(path, tuning.machine(device), state, entries)
    return result | {
        "entries": {
            op: {key: entry for key, entry in found.items() if entry is not None}
            for op, found in entries.items()
        }
    }
