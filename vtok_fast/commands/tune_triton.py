"""The half of ``vtok-fast tune`` for Triton kernels: which tile is the fastest for each class of launches.

A launcher asks `vtok_fast.dispatch.tuning.chosen` for its tile and says which others there are. So
nothing here knows an op: whatever is asked for while a call runs is a class, and the call is then timed with
    each of its tiles in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench import harness
from vtok_fast.bench.harness import Candidate
from vtok_fast.dispatch import backends, tuning

Class = tuple[str, str]  # the op's name in a table, and the class of its launches


class Launch(NamedTuple):
    """A call of an op that launches kernels of a class, how its backend runs it, and the tiles: the built-in
    one first."""

    call: Any
    run: Callable[[Any], Any]
    tiles: tuple[tuple[Any, ...], ...]


@contextmanager
def choosing(watch: tuning.Watch) -> Iterator[None]:
    """Within it ``watch(op, class, built-in tile, options)`` chooses every tile, and no table does."""
    before, tuning._watch = tuning._watch, watch
    try:
        yield
    finally:
        tuning._watch = before


def launches_of(run: Callable[[], Any]) -> dict[Class, Launch]:
    """One call for each class of Triton launches within ``run()``, with its tensors."""
    found: dict[Class, Launch] = {}

    def note(name: str, call: Any, backend: backends.Backend) -> None:
        def watch(op: str, key: str, tile: Any, options: Callable[[Any], Any]) -> Any:
            found.setdefault(
                (op, key), Launch(call, backend.run, tuple(dict.fromkeys((tile, *options(tile)))))
            )
            return tile

        if backend.name == "triton":
            with choosing(watch):
                backend.run(call)

    with harness.selections(note):
        run()
    return found


def execute(of: Class, launch: Launch, tile: tuple[Any, ...], *fields: Any) -> Any:
    """Runs the launch's call on these fields: its class with ``tile``, all else with what is built in."""
    with choosing(lambda op, key, built_in, options: tile if (op, key) == of else built_in):
        return launch.run(type(launch.call)(*fields))


def candidates(of: Class, launch: Launch) -> tuple[list[Candidate], dict[str, str]]:
    """A candidate per tile, the built-in one first as "untuned"; and why others are left out: they do not
    fit, or compute something else than the built-in one."""
    built_in, *others = launch.tiles
    fields = tuple(launch.call)
    want = execute(of, launch, built_in, *fields)
    found, left_out = (
        [Candidate("untuned", partial(execute, of, launch, built_in), "ours", inputs=fields)],
        {},
    )
    for tile in others:
        try:
            got = execute(of, launch, tile, *fields)
        except Exception as error:  # whatever a compiler may say
            left_out[str(tuple(tile))] = (str(error).strip().splitlines() or [type(error).__name__])[0]
            continue
        if all(map(_alike, _tensors(got), _tensors(want))):
            found.append(
                Candidate(str(tuple(tile)), partial(execute, of, launch, tile), "variant", inputs=fields)
            )
        else:
            left_out[str(tuple(tile))] = "another result than the built-in tile's"
    return found, left_out


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


def _alike(got: Tensor, want: Tensor) -> bool:
    """The same, where nothing is rounded; else as close as two good results are, of which each is within the
    floor of *close*."""
    same = (got == want) | ((got != got) & (want != want))  # infinities and NaN too
    if not want.is_floating_point():
        return bool(same.all())
    apart = torch.where(same, 0.0, got.double() - want.double())
    return bool(
        apart.norm()
        <= 2 * parity.floor(want.dtype) * torch.where(same & ~want.isfinite(), 0.0, want.double()).norm()
    )
