"""The cache of transformed weights: never stale, within its bound, safe from several threads."""

import threading

import pytest
import torch
from torch.nn.functional import conv3d

from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d.call import Geometry

lib = native.lib()
pytestmark = pytest.mark.needs_native
SET_LIMIT = 1 << 30


@pytest.fixture(autouse=True)
def fresh_cache():
    if lib is None:
        yield
        return
    lib.clear_weight_cache()
    lib.set_weight_cache(SET_LIMIT)
    yield
    lib.clear_weight_cache()


def run(x, weight, m=4):
    out = torch.empty(x.shape[0], weight.shape[0], *x.shape[2:]).to(memory_format=torch.channels_last_3d)
    lib.causal_conv3d(
        native.arg(x),
        native.arg(weight),
        None,
        None,
        None,
        native.arg(out),
        Geometry(pad=(weight.shape[2] - 1, 0, 1, 1, 1, 1)).native(),
        None,
        False,
        m,
        1,
    )
    return out


def right(y, x, weight):
    padded = torch.nn.functional.pad(x.double(), (1, 1, 1, 1, weight.shape[2] - 1, 0))
    ref = conv3d(padded, weight.double())
    return bool((y.double() - ref).norm() <= 16 * 2**-23 * ref.norm())


def make(outputs=32, channels=32, kt=1):
    return torch.randn(1, channels, 2, 8, 8), torch.randn(outputs, channels, kt, 3, 3)


def stats():
    return lib.weight_cache_stats()


def test_hits_are_counted_and_the_result_stays_the_same():
    x, w = make()
    first = run(x, w)
    assert (stats()["hits"], stats()["misses"], stats()["entries"]) == (0, 1, 1)
    assert torch.equal(run(x, w), first)
    assert (stats()["hits"], stats()["misses"], stats()["entries"]) == (1, 1, 1)
    run(x, w.clone())  # the same content elsewhere is the same entry
    assert (stats()["hits"], stats()["entries"]) == (2, 1)
    run(x, w, m=2)
    assert stats()["entries"] == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.data.mul_(2),
        lambda w: w.data.neg_(),
        lambda w: w.data.view(-1)[-1:].add_(1),
        lambda w: w.data[0, 0].neg_(),
        lambda w: w.data.copy_(w.data.flip(0)),
        lambda w: w.data.copy_(torch.randn_like(w)),
    ],
)
def test_writes_that_bump_no_version_are_seen(change):
    x, w = make()
    run(x, w)
    before = w.clone()
    change(w)
    assert not torch.equal(before, w)
    assert right(run(x, w), x, w)
    assert stats()["entries"] == 1  # what the weights were before is dropped


def test_swapping_weights_back_and_forth():
    x, w = make()
    a, b = w.clone(), torch.randn_like(w)
    for _ in range(3):
        w.data.copy_(a)
        assert right(run(x, w), x, a)
        w.data.copy_(b)
        assert right(run(x, w), x, b)


def test_reallocated_weights_at_one_address():
    x, w = make()
    storage = torch.empty(w.numel())
    for _ in range(5):
        torch.randn(w.numel(), out=storage)
        view = storage.view(w.shape)
        assert right(run(x, view), x, view)
        other = storage.view(16, 64, 1, 3, 3)  # the same bytes in another shape
        x2 = torch.randn(1, 64, 2, 8, 8)
        assert right(run(x2, other), x2, other)


def test_strides_are_part_of_the_content():
    x, w = make()
    assert right(run(x, w), x, w)
    t = w.transpose(0, 1)  # the same memory read otherwise
    assert right(run(x, t), x, t)
    every_other = torch.randn(64, 32, 1, 3, 3)[::2]
    assert right(run(x, every_other), x, every_other)


def test_the_bound_is_respected_and_cyclic_use_does_not_thrash():
    x, w = make()
    weights = [torch.randn_like(w) for _ in range(6)]
    run(x, weights[0])
    one = stats()["bytes"]
    assert one >= 36 * w.shape[0] * w.shape[1] * 4
    lib.set_weight_cache(4 * one)
    for _ in range(3):
        for v in weights:
            assert right(run(x, v), x, v)
            assert stats()["bytes"] <= 4 * one
    assert stats()["entries"] == 4
    assert stats()["hits"] == 9  # the first one at once, four of six in the second and third rounds
    lib.set_weight_cache(one)
    assert stats()["entries"] == 1 and stats()["bytes"] <= one
    lib.set_weight_cache(0)
    assert stats()["entries"] == 0 and stats()["bytes"] == 0
    assert right(run(x, w), x, w)
    assert stats()["entries"] == 0


def test_entries_unused_for_long_give_way():
    x, old = make(16, 16)
    run(x, old)
    lib.set_weight_cache(2 * stats()["bytes"])
    kept = torch.randn_like(old)
    run(x, kept)
    newcomer = torch.randn_like(old)
    for _ in range(1100):
        run(x, kept)
    run(x, newcomer)
    hits = stats()["hits"]
    run(x, newcomer)
    run(x, kept)
    assert stats()["hits"] == hits + 2 and stats()["entries"] == 2


@pytest.mark.volatile
def test_threads_share_it():
    x, w = make(kt=3)
    weights = [torch.randn_like(w) for _ in range(4)]
    run(x, weights[0])
    lib.set_weight_cache(2 * stats()["bytes"])
    wrong = []

    def work(offset):
        for i in range(20):
            v = weights[(i + offset) % 4]
            if not right(run(x, v), x, v):
                wrong.append(i)
            if i % 7 == offset:
                lib.clear_weight_cache()

    workers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in workers:
        t.start()
    for t in workers:
        t.join()
    assert not wrong
