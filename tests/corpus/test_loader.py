"""The order of a corpus and going on in it: nothing is left out or comes twice, whatever changes."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.corpora import corpus

import vtok_fast
from vtok_fast.corpus.order import Order

CLIPS = 23


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return vtok_fast.TokenDataset(corpus(tmp_path_factory.mktemp("corpus") / "c", CLIPS, shard=5))


@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_order_is_a_permutation(count, seed, epoch):
    order = Order(count, seed, epoch)
    found = order(np.arange(count))
    assert np.array_equal(np.sort(found), np.arange(count))
    some = np.arange(count)[::3]
    assert np.array_equal(order(some), found[some])  # wherever it is entered


def test_order_is_even():
    """Every clip is as often at every place: chi-square over 1,000 epochs, with 4 standard deviations."""
    for count in (2, 5, 16):
        places = np.zeros((count, count))
        for epoch in range(1000):
            places[np.arange(count), Order(count, 3, epoch)(np.arange(count))] += 1
        expected, freedom = 1000 / count, (count - 1) ** 2
        chi = ((places - expected) ** 2 / expected).sum()
        assert abs(chi - freedom) < 4 * (2 * freedom) ** 0.5 + 4, (count, chi)


def test_order_is_the_same_everywhere():
    """What it is today: a saved position means this order for ever."""
    assert Order(10, 0, 0)(np.arange(10)).tolist() == EXPECTED
    assert not np.array_equal(Order(500, 0, 0)(np.arange(500)), Order(500, 0, 1)(np.arange(500)))
    assert not np.array_equal(Order(500, 0, 0)(np.arange(500)), Order(500, 1, 0)(np.arange(500)))
    with pytest.raises(IndexError):
        Order(10, 0, 0)(np.array([10]))


EXPECTED = [7, 8, 6, 2, 0, 5, 3, 4, 9, 1]


def order_of(dataset, epochs, seed=7):
    """Names in the order of so many epochs: what one trainer without workers gets, one by one."""
    loader = vtok_fast.TokenLoader(dataset, 1, seed=seed, epochs=epochs)
    return [clip.name for (clip,) in loader]


def run(dataset, state, ranks, batch, steps, epochs, **options):
    """The names that each step gives to all ranks, and the state afterwards, which all ranks agree in."""
    loaders = [
        vtok_fast.TokenLoader(dataset, batch, seed=7, rank=rank, ranks=ranks, epochs=epochs, **options)
        for rank in range(ranks)
    ]
    given = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        mine = []
        for clips in loader:
            mine.append([clip.name for clip in clips])
            if len(mine) == steps:
                break
        given.append(mine)
    states = [loader.state_dict() for loader in loaders]
    if steps is not None:
        assert all(one == states[0] for one in states)
    return [
        name
        for step in range(max(map(len, given)))
        for mine in given
        for name in mine[step : step + 1]
        for name in name
    ], states[0]


def test_an_epoch_is_the_corpus(dataset):
    names = order_of(dataset, 3)
    epochs = [names[CLIPS * k : CLIPS * (k + 1)] for k in range(3)]
    assert all(sorted(one) == dataset.names for one in epochs)
    assert len({tuple(one) for one in epochs}) == 3 and names[:CLIPS] != dataset.names
    assert order_of(dataset, 1, seed=8) != epochs[0]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=4))
def test_going_on_is_exact(dataset, legs):
    """Any ranks and batch sizes after one another, across the ends of epochs: the order of one trainer."""
    names, state = [], None
    for ranks, batch, steps in legs:
        more, state = run(dataset, state, ranks, batch, steps, None)
        assert len(more) == ranks * batch * steps
        names += more
        assert state["epoch"] * CLIPS + state["delivered"] == len(names)
    assert names == order_of(dataset, len(names) // CLIPS + 1)[: len(names)]


@pytest.mark.parametrize("ranks,batch", [(1, 4), (2, 3), (3, 4), (5, 7)])
def test_ranks_together_have_every_clip_once(dataset, ranks, batch):
    """A last step that is not full is shared; some ranks may have nothing of it, and all count it."""
    names, state = run(dataset, None, ranks, batch, None, 1)
    assert Counter(names) == Counter(dataset.names) and names == order_of(dataset, 1)
    assert state["epoch"] == 1 and state["delivered"] == 0
    again, _ = run(dataset, state, 1, 1, CLIPS, None)  # the end of an epoch: the next one begins
    assert again == order_of(dataset, 2)[CLIPS:]
    assert run(dataset, state, ranks, batch, 1, 1) == ([], state)


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_do_not_matter(dataset, context):
    """They read ahead; what counts is what the loop has. From 2 workers to none to 1, at 1 to 2 ranks."""
    two = {"num_workers": 2, "multiprocessing_context": context, "prefetch_factor": 3}
    names, state = run(dataset, None, 1, 2, 4, None, **two)
    more, state = run(dataset, state, 2, 3, 2, None)
    last, state = run(dataset, state, 1, 5, 2, None, **{**two, "num_workers": 1})
    names += more + last
    assert names == order_of(dataset, 2)[:30] and (state["epoch"], state["delivered"]) == (1, 7)


def test_another_corpus_is_refused(dataset, tmp_path):
    state = vtok_fast.TokenLoader(dataset, 1).state_dict()
    for other in (corpus(tmp_path / "a", CLIPS - 1), corpus(tmp_path / "b", CLIPS, prefix="other")):
        loader = vtok_fast.TokenLoader(vtok_fast.TokenDataset(other), 1)
        with pytest.raises(ValueError, match="state: of another corpus"):
            loader.load_state_dict(state)
    for wrong in ({"epoch": -1}, {"delivered": CLIPS}, {"delivered": -1}):
        with pytest.raises(ValueError, match="state: epoch"):
            vtok_fast.TokenLoader(dataset, 1).load_state_dict(state | wrong)
    for name, value in (("batch_size", 0), ("ranks", 0), ("epochs", -1), ("rank", 1)):
        with pytest.raises(ValueError, match=f"{name}={value}"):
            vtok_fast.TokenLoader(dataset, **{"batch_size": 1, name: value})


def test_a_fingerprint_is_of_the_tokens(tmp_path):
    """The same clips in shards or in their own files are one corpus; the seed comes with the position."""
    torch.manual_seed(0)
    one = vtok_fast.TokenDataset(corpus(tmp_path / "one", 6, shard=2))
    torch.manual_seed(0)
    other = vtok_fast.TokenDataset(corpus(tmp_path / "other", 6))
    assert one.fingerprint == other.fingerprint
    loader = vtok_fast.TokenLoader(other, 2, seed=1)
    loader.load_state_dict(vtok_fast.TokenLoader(one, 2, seed=5).state_dict())
    assert loader.seed == 5


def test_collate_makes_the_batch(dataset):
    loader = vtok_fast.TokenLoader(
        dataset, 4, epochs=1, collate=lambda clips: torch.stack([clip.indices for clip in clips])
    )
    shapes = [tuple(batch.shape) for batch in loader]
    assert shapes == [(4, 36)] * 5 + [(3, 36)]
