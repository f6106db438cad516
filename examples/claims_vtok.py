"""VTok's claim in miniature: a key frame and one residual token per frame (T + S tokens) against S tokens of
every frame (T * S).

    python examples/claims_vtok.py

*Reconstruction*: one model is trained on clips, another one, of the same structure, on single frames. The
second is then used on every frame, and on as few frames as cost what the first one costs, each shown until
the next ("sampled"). *Understanding*: a small language model with random weights learns to say which way the
picture moves, from either model's tokens (`vtok_llm.py`).
"""

from __future__ import annotations

import functools
import random
import sys

import torch
from miniature import (
    HOLD_OUT,
    arguments,
    bars,
    held_out,
    new_figure,
    plain_loss,
    psnr,
    publish,
    steps,
    table,
    training_clips,
)
from miniature import train as train_model
from torch import Tensor
from train import reconstruction_error
from vtok_llm import DIRECTIONS, moving, probe, tiny_lm

from vtok_fast.io.video import read_video
from vtok_fast.models import VTok, VTokConfig

SHAPE, SIZE = (2, 16, 48, 48), 48
FRAMES = (4, 8, 16)
FIELDS = VTokConfig.presets["tiny"]


def single_frames(video: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B * T, C, 1, H, W)"""
    return video.transpose(1, 2).flatten(0, 1).unsqueeze(2)


def framewise(model: VTok, video: Tensor, every: int = 1) -> Tensor:
    """Every such frame with key tokens of its own, shown until the next one."""
    frames = (
        model(single_frames(video[:, :, ::every]))
        .squeeze(2)
        .unflatten(0, (video.shape[0], -1))
        .transpose(1, 2)
    )
    return frames.repeat_interleave(every, dim=2)[:, :, : video.shape[2]]


def framewise_loss(model: VTok, x: Tensor, step: int) -> Tensor:
    return reconstruction_error(framewise(model, x), x)


def interval(frames: int, tokens: int) -> int:
    """So that no more than T + S tokens, rounded to whole frames, are spent on every so-manyth frame."""
    return -(-frames // max(1, round((frames - 1 + tokens) / tokens)))


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    clips, count, questions = training_clips(options), steps(options, 2500), steps(options, 1500)
    models = {}
    for name, loss in (("clips", plain_loss()), ("frames", framewise_loss)):
        torch.manual_seed(0)
        models[name] = VTok(FIELDS)
        train_model(models[name], clips, count, SHAPE, lr=1e-3, loss=loss, label=name)
    key = models["clips"].config.key_tokens
    rows, curves = [], {"T + S": [], "T * S": [], "sampled": []}
    for frames in FRAMES:
        videos, every = held_out(options, frames, SIZE), interval(frames, key)
        scores = (
            psnr(models["clips"], videos),
            psnr(lambda v: framewise(models["frames"], v), videos),
            psnr(functools.partial(framewise, models["frames"], every=every), videos),
        )
        rows.append(
            (
                frames,
                models["clips"].num_tokens(frames, SIZE, SIZE),
                frames * key,
                -(-frames // every) * key,
                *scores,
            )
        )
        for name, score in zip(curves, scores, strict=True):
            curves[name].append(score)

    sets = [
        moving(pictures(options, part), random.Random(part), number, FRAMES[-1], SIZE)
        for part, number in (("training", 2048), ("test", 512))
    ]
    every = interval(FRAMES[-1], key)
    encoders = {
        "T + S": lambda v: models["clips"].sequence(models["clips"].encode(v)),
        f"{FRAMES[-1] // every} frames sampled": lambda v: keys(models["frames"], v[:, :, ::every]),
        "key frame alone": lambda v: models["clips"].sequence(models["clips"].encode(v))[:, :key],
    }
    answers = [
        (name, encode(sets[1][0][:1]).shape[1], f"{probe(encode, tiny_lm, *sets, steps=questions):.0%}")
        for name, encode in encoders.items()
    ]

    _, few, many, _, short, full, sampled = rows[-1]
    error = (1 / len(DIRECTIONS) * (1 - 1 / len(DIRECTIONS)) / len(sets[1][1])) ** 0.5
    crop = "x".join(map(str, SHAPE[1:]))
    body = (
        f"`python examples/claims_vtok.py`: S = {key}, {count} steps each on crops of {crop}, held out: 6 "
        f"clips of each length "
        f"at {SIZE}x{SIZE}; PSNR in dB.\n\n"
        + table(("frames", "tokens, T + S", "tokens, T * S", "tokens, sampled", *curves), rows)
        + f"\n\nAt {FRAMES[-1]} frames T + S has {few / many:.0%} of the tokens of T * S and loses "
        f"{full - short:.2f} dB to "
        f"it; against frames sampled at the same cost it {'gains' if short > sampled else 'loses'} "
        f"{abs(short - sampled):.2f} dB.\n\n### Which way does it move?\n\n"
        f"A Llama of two layers with random weights learns the answer from the tokens of "
        f"{len(sets[0][1]):,} sliding windows "
        f"over frames of the training clips ({questions} steps); {len(sets[1][1])} windows over held-out "
        f"frames test it. "
        f"Chance is {1 / len(DIRECTIONS):.0%}, with a standard error of {error:.1%}: what lies within two "
        f"of them says "
        "nothing.\n\n" + table(("tokens", "number", "right answers"), answers)
    )
    figure, axes = new_figure(2)
    for name, values in curves.items():
        axes[0].plot(FRAMES, values, marker="o", label=name)
    axes[0].set(xlabel="frames", ylabel="PSNR of held-out frames, dB")
    axes[0].legend()
    shares = [float(share.rstrip("%")) for *_, share in answers]
    bars(axes[1], [name.replace(" ", "\n", 1) for name, *_ in answers], shares, "right directions, %")
    axes[1].axhline(100 / len(DIRECTIONS), color="gray", linestyle=":")
    publish(options, "vtok", "VTok: T + S tokens against T * S", body, figure)
    return 0


def keys(model: VTok, video: Tensor) -> Tensor:
    """The key tokens of every frame in a row, (B, T * S, C)."""
    return model.sequence(model.encode(single_frames(video))).unflatten(0, (video.shape[0], -1)).flatten(1, 2)


def pictures(options, part: str) -> list[Tensor]:
    """Single frames: of the held-out scenes for the test, of the other clips for the training."""
    if part == "test":
        video = read_video(
            options.data / HOLD_OUT[0], size=128, start=HOLD_OUT[1], frames=HOLD_OUT[2] - HOLD_OUT[1]
        ).video
        return list(video[:, ::10].unbind(1))
    names = sorted(path.name for path in options.data.glob("*.mp4") if path.name != HOLD_OUT[0])
    return [
        frame
        for name in names
        for frame in read_video(options.data / name, size=128).video[:, ::10].unbind(1)
    ]


if __name__ == "__main__":
    sys.exit(main())
