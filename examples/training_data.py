"""Random crops of video clips, for `train.py`."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from torch import Tensor

from vtok_fast.io.video import read_video, to_float

SUFFIXES = (".mp4", ".mkv", ".mov", ".avi", ".webm")
# Each clip is kept at several sizes: the same objects, seen from nearer and farther
SHORT_SIDES = (
    128,
    176,
    256,
)


def parse_hold_out(text: str) -> tuple[str, int, int]:
    """ "bikes.mp4:0-137" -> ("bikes.mp4", 0, 137): frames 0 to 136 of that file are for validation, the rest
    for training."""
    try:
        name, frames = text.rsplit(":", 1)
        first, last = (int(part) for part in frames.split("-"))
    except ValueError:
        raise ValueError(f"hold_out={text!r}: expected FILE:FIRST-END, such as bikes.mp4:0-137") from None
    if not 0 <= first < last:
        raise ValueError(f"hold_out={text!r}: needs 0 <= FIRST < END")
    return name, first, last


class Clips:
    """The clips of a folder in memory, without the frames that are held out.

    Raises FileNotFoundError if the folder has no video, ValueError if nothing is left to train on.
    """

    def __init__(
        self,
        folder: Path,
        hold_out: tuple[str, int, int] | None = None,
        short_sides: tuple[int, ...] = SHORT_SIDES,
    ):
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise FileNotFoundError(f"data: no video ({', '.join(SUFFIXES)}) in {folder}")
        if hold_out and hold_out[0] not in [path.name for path in paths]:
            raise ValueError(f"hold_out={hold_out[0]!r} is none of {', '.join(path.name for path in paths)}")
        self.groups: list[list[Tensor]] = []  # per file: its pieces (C, T, H, W) uint8, in several sizes
        for path in paths:
            group = []
            for short in short_sides:
                video = read_video(path, size=short, dtype=torch.uint8).video
                pieces = [video]
                if hold_out and path.name == hold_out[0]:
                    pieces = [video[:, : hold_out[1]], video[:, hold_out[2] :]]
                group += [piece.clone() for piece in pieces if piece.shape[1] > 1]
            if group:
                self.groups.append(group)
        if not self.groups:
            raise ValueError(f"data: nothing is left in {folder} without the frames held out")

    def sample(self, dice: random.Random, shape: tuple[int, int, int, int]) -> Tensor:
        """A batch (B, 3, T, H, W) in [-1, 1], shape = (B, T, H, W), every clip of it cropped and changed at
        random."""
        return torch.stack([self._crop(dice, *shape[1:]) for _ in range(shape[0])])

    def _crop(self, dice: random.Random, frames: int, height: int, width: int) -> Tensor:
        # Files equally often, long or short; within a file, pieces by their length.
        group = [
            piece
            for piece in dice.choice(self.groups)
            if piece.shape[2] >= height and piece.shape[3] >= width
        ]
        if not group:
            raise ValueError(f"crop: a clip has no piece of {height}x{width} pixels")
        piece = dice.choices(group, [piece.shape[1] for piece in group])[0]
        stride = min(
            dice.choice((1, 1, 1, 2, 3)), max(1, (piece.shape[1] - 1) // (frames - 1) if frames > 1 else 1)
        )
        start = dice.randrange(max(1, piece.shape[1] - stride * (frames - 1)))
        top, left = dice.randrange(piece.shape[2] - height + 1), dice.randrange(piece.shape[3] - width + 1)
        times = torch.arange(start, start + stride * frames, stride).clamp(max=piece.shape[1] - 1)
        x = to_float(piece[:, times, top : top + height, left : left + width])
        if dice.random() < 0.5:
            x = x.flip(3)
        if dice.random() < 0.5:
            x = x.flip(1)  # backwards in time
        return self._recolor(dice, x)

    @staticmethod
    def _recolor(dice: random.Random, x: Tensor) -> Tensor:
        """Hue, saturation, contrast and brightness: few clips stand for the colors of many."""
        turn = dice.uniform(0, 2 * math.pi) if dice.random() < 0.7 else 0.0
        saturation = dice.uniform(0.6, 2.0)
        gray = torch.full((3, 3), 1 / 3)
        # A quarter turn about the gray axis.
        across = 3**-0.5 * torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
        matrix = gray + saturation * (math.cos(turn) * (torch.eye(3) - gray) + math.sin(turn) * across)
        x = torch.einsum("ij,jthw->ithw", matrix, x)
        return (dice.uniform(0.6, 1.15) * x + dice.uniform(-0.25, 0.25)).clamp(-1.0, 1.0)
