"""Fixtures that tests of several rooms use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vtok_fast.dispatch import native


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a busy machine, small parallel regions wait for each other's threads most of the time. Benchmarks
    also set the bound of the weight cache; it is given back too."""
    threads, lib = torch.get_num_threads(), native.lib()
    bound = lib.weight_cache_stats()["bound"] if lib else 0
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    if lib:
        lib.set_weight_cache(bound)
