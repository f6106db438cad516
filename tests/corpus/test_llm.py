"""A language model trains on a corpus of tokens, and a run that was stopped goes on to the same weights."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.corpora import corpus

import vtok_fast

pytest.importorskip("transformers", reason="transformers is not installed")

from vtok_llm import VideoLM, codes_of, tiny_lm  # noqa: E402

LEVELS = (8, 8, 8)


def trained(dataset, steps, batch, stop=None):
    """The losses and weights after so many steps, perhaps with a new loader after `stop` of them."""
    torch.manual_seed(0)
    model = VideoLM(tiny_lm(), len(LEVELS))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make = partial(vtok_fast.TokenLoader, dataset, batch, seed=3, collate=partial(codes_of, levels=LEVELS))
    loader, losses = make(), []
    batches = iter(loader)
    for step in range(steps):
        if step == stop:
            state, loader = loader.state_dict(), make(num_workers=1)
            loader.load_state_dict(state)
            batches = iter(loader)
        codes = next(batches)
        assert codes.shape == (batch, 24, 3) and codes.abs().max() <= 1
        question = torch.full((batch, 1), 4)
        target = (codes.sum((1, 2)) > 0).long()
        loss = F.cross_entropy(model(codes, question)[:, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def test_training_on_a_corpus_goes_on(tmp_path):
    dataset = vtok_fast.TokenDataset(corpus(tmp_path / "c", 7, 512, 3, ((2, 3, 4),)))
    losses, weights = trained(dataset, 6, 2)  # into the second epoch
    again, same = trained(dataset, 6, 2, stop=4)
    assert losses == again and len(set(losses)) > 1
    assert all(torch.equal(weights[name], same[name]) for name in weights)
