"""A pytest plugin: Triton's interpreter puts its functions in the place of those of ``triton.language`` once
a launch.

By itself it does so again at every call of one function by another within a kernel: a third of its time, for
nothing, since what stands in their place stays there until the launch ends.

The programs of a launch run in random order, the same one each time: no GPU promises another.
"""

import itertools
import random

from triton.runtime import interpreter

patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
done: dict[frozenset, interpreter._LangPatchScope] = {}


def patch_once(function):
    languages = (interpreter.tl, interpreter.tl.core)
    seen = frozenset(
        id(x) for x in function.__globals__.values() if any(x is language for language in languages)
    )
    if seen not in done:
        done[seen] = patch(function)
    return done[seen]


def launch_anew(self, *args, **kwargs):
    done.clear()
    return launch(self, *args, **kwargs)


interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_anew


builder, generator = interpreter.interpreter_builder, random.Random(0)
set_dimensions, set_place = builder.set_grid_dim, builder.set_grid_idx
order: dict[tuple[int, ...], tuple[int, ...]] = {}


def set_dimensions_and_order(*grid):
    set_dimensions(*grid)
    places = list(itertools.product(*map(range, grid)))
    order.clear()
    order.update(zip(places, generator.sample(places, len(places))))


builder.set_grid_dim = set_dimensions_and_order
builder.set_grid_idx = lambda *place: set_place(*order[place])
