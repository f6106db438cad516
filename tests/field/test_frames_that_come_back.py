"""A user who reads `encode(video) -> Tokens, decode -> video` expects every frame back. Where a system's rule
drops some, it says so (zai-org/CogVideo #547, microsoft/VidTok #16, NVIDIA/cosmos #111: 16 frames for 17).
"""

from __future__ import annotations

import warnings

import pytest
import torch

from vtok_fast import models
from vtok_fast.models import VidTok

SYSTEMS = (models.Cosmos, models.InfoTok, models.ProMAG, models.TivTok, models.VTok)
FRAMES = (1, 2, 3, 5, 6, 8, 9, 12, 16, 17)


def clip(model, frames):
    side = 2 * model.config.spatial_factor
    return (
        torch.rand(
            1, model.config.in_channels, frames, side, side, generator=torch.Generator().manual_seed(0)
        )
        * 2
        - 1
    )


def vidtok(**fields):
    config = VidTok("tiny").config.to_dict()
    return VidTok({**config, **fields}).eval()


@pytest.mark.parametrize("fields", ({}, {"version": "1.1"}, {"causal": False}), ids=str)
def test_vidtok_knows_and_says_how_many_come_back(fields, monkeypatch):
    for frames in FRAMES:
        model = vidtok(**fields)
        monkeypatch.setattr(VidTok, "_has_warned", False)
        x = clip(model, frames)
        back = model.decoded_frames(frames)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                tokens = model.encode(x)
            except ValueError:
                assert not model.config.causal and frames < model.config.time_downsample_factor
                continue
            assert model.decode(tokens).shape[2] == back
            model.encode(x)
        messages = [str(w.message) for w in caught]
        if back == frames:
            assert not messages
            model.encode(x, strict=True)
        else:
            assert len(messages) == 1 and f"of its {frames} frames, {back} come back" in messages[0]
            assert caught[0].filename == __file__
            with pytest.raises(ValueError, match=f"of its {frames} frames, {back} come back"):
                model.encode(x, strict=True)


def test_it_says_so_once_in_a_program(monkeypatch):
    """A program that makes a model for every clip does not fill its log; strict refuses every time."""
    monkeypatch.setattr(VidTok, "_has_warned", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for fields in ({}, {}, {"version": "1.0"}):
            model = vidtok(**fields)
            model.encode(clip(model, 6))
            for _ in range(2):
                with pytest.raises(ValueError, match="of its 6 frames, 5 come back"):
                    model.encode(clip(model, 6), strict=True)
    assert len(caught) == 1 and "come back" in str(caught[0].message)


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda s: s.__name__)
def test_the_other_systems_give_every_frame_back(system):
    model = system("tiny").eval()
    for frames in FRAMES[:7]:
        x = clip(model, frames)
        with torch.no_grad():
            assert model.decode(model.encode(x)).shape[2] == frames
