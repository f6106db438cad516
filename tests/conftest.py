"""What all tests share: one thread, numbers that a seed decides, and settings that every test gives back.

Every run has the same tests: torch and Python draw from seed 0, and hypothesis takes the same examples. The
environment variable VTOK_FAST_TEST_SEED (`make test-all`) chooses other ones; subprocesses inherit it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

# Before torch is imported: the processes of pytest-xdist share the cores among themselves, and small parallel
# regions wait for each other's threads most of the time. What needs more threads asks for them.
os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from support import emulator  # noqa: E402

from vtok_fast.dispatch import native  # noqa: E402

SEED = int(os.environ.get("VTOK_FAST_TEST_SEED", 0))
RANDOM = "VTOK_FAST_TEST_SEED" in os.environ
torch.set_num_threads(1)


class TorchRandom:
    """torch's generator, for hypothesis: every example starts from one state, as of Python's and numpy's."""

    getstate, setstate = staticmethod(torch.get_rng_state), staticmethod(torch.set_rng_state)

    @staticmethod
    def seed(number: int) -> None:
        torch.manual_seed(number + SEED)


TORCH = TorchRandom()  # hypothesis itself keeps a weak reference alone
hypothesis.register_random(TORCH)
ANY_SPEED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("same examples", derandomize=True, **ANY_SPEED)
hypothesis.settings.register_profile("random examples", database=None, print_blob=True, **ANY_SPEED)
hypothesis.settings.load_profile("random examples" if RANDOM else "same examples")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANDOM:
        config.option.hypothesisseed = SEED


def pytest_report_header() -> str:
    return f"seed: {SEED}, VTOK_FAST_TEST_SEED={SEED} repeats it" if RANDOM else "seed: 0, no random examples"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if hypothesis.is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.volatile)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker, module in (("needs_native", native), ("needs_emulator", emulator)):
        if item.get_closest_marker(marker) and (reason := module.why_missing()):
            pytest.skip(reason)


def _seed() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """What a module shares is the same, whichever of its tests comes first."""
    if fixturedef.scope != "function":
        _seed()


@pytest.fixture(autouse=True)
def seed() -> int:
    _seed()
    return SEED


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    """The number of threads, the instruction set and the bound of the weight cache are as before."""
    threads, lib = torch.get_num_threads(), native.lib()
    isa, bound = (lib.isa(), lib.weight_cache_stats()["bound"]) if lib else (None, None)
    yield
    torch.set_num_threads(threads)
    if lib:
        lib.set_isa(isa)
        lib.set_weight_cache(bound)


@pytest.fixture(params=native.lib().supported_isas() if native.lib() else [])
def isa(request: pytest.FixtureRequest) -> str:
    """Each instruction set that the native module has for this processor, in turn."""
    native.lib().set_isa(request.param)
    return request.param
