"""VidTok's claims in miniature: tokens (FSQ) against a Gaussian latent (KL) at equal rate, the use of the
codebook, and two stages.

    python examples/claims_vidtok.py

Three parts. *Rate*: FSQ models of 12, 18 and 21 bits per position, and KL models whose loss weight is steered
during training until their latent carries so many bits per position of the training's crops. What a Gaussian
costs is its KL divergence in bits; a decoder that pays that much gets a sample of the latent, not its mean.
Held-out clips cost other rates than the training's crops, so the two curves are compared at 18 bits by
interpolation. *Codebook*: how many of the 262,144 entries occur on the held-out clips, against a model that
is trained without the quantizer's own loss. *Two stages*: the same number of pixels spent on small crops
alone, or on small crops and then on the decoder alone, at twice the height and width.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from initialize import initialize
from miniature import (
    arguments,
    bars,
    held_out,
    new_figure,
    plain_loss,
    psnr,
    publish,
    steps,
    table,
    train,
    training_clips,
)
from torch import Tensor
from train import reconstruction_error

from vtok_fast import metrics
from vtok_fast.models import VidTok

SHAPE, LARGE = (1, 5, 32, 32), (1, 5, 64, 64)
BASE = {"ch": 16, "ch_mult": (1, 2, 3), "num_res_blocks": 1}
KL = {**BASE, "z_channels": 6, "regularizer": "kl"}
LEVELS = (4, 8, 11)  # of each of six channels: 12, 18 and 20.8 bits
KL_BITS = (16.0, 24.0, 32.0)  # of the training's crops; clean clips cost a fourth less or so
AUX = 0.02  # the weight of FSQ's own loss
LR = 3e-4

Draw = Callable[[Any], None]  # draws on axes


class EqualRate:
    """A loss whose weight of the KL term is moved until the latent carries so many bits per position."""

    def __init__(self, bits: float):
        self.bits, self.weight, self.rate = bits, 1e-4, 0.0

    def __call__(self, model: VidTok, x: Tensor, step: int) -> Tensor:
        result = model.reconstruct(x, step=step)
        # The model's loss is the mean over clips
        rate = result.loss * x.shape[0] / (math.log(2) * result.codes[:, 0].numel())
        self.rate = 0.9 * self.rate + 0.1 * rate.item() if step else rate.item()
        self.weight = min(
            1.0, max(1e-7, self.weight * math.exp(0.2 * max(-1.0, min(1.0, self.rate / self.bits - 1))))
        )
        return reconstruction_error(result.video, x) + self.weight * rate


@torch.no_grad()
def rate(model: VidTok, videos: Tensor) -> float:
    """Bits per latent position of a Gaussian model on videos."""
    bits = positions = 0.0
    for video in videos:
        result = model.reconstruct(video[None])
        bits, positions = bits + result.loss.item() / math.log(2), positions + result.codes[:, 0].numel()
    return bits / positions


@torch.no_grad()
def sampled(model: VidTok, video: Tensor) -> Tensor:
    """The reconstruction from a sample of the latent."""
    z = model.regularization(model.encoder(video), sample=True).codes
    return model.decoder(z)[:, :, -video.shape[2] :]


def started(fields: dict, clips) -> VidTok:
    torch.manual_seed(0)
    model = VidTok(fields)
    initialize(model, clips.sample(random.Random(0), (8, *SHAPE[1:])))
    return model


def fsq(levels: int) -> dict:
    return {**BASE, "z_channels": 6, "levels": (levels,) * 6}


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    clips, videos = training_clips(options), held_out(options, 17, 64)
    count, extra = steps(options, 900), steps(options, 400)
    plan = {f"FSQ, {6 * math.log2(n):.3g} bits": (fsq(n), plain_loss(aux=AUX)) for n in LEVELS}
    plan |= {f"KL, {bits:g} bits": (KL, EqualRate(bits)) for bits in KL_BITS}
    plan["FSQ, 18 bits, reconstruction loss alone"] = (fsq(8), plain_loss())
    models = {}
    for name, (fields, loss) in plan.items():
        models[name] = started(fields, clips)
        train(models[name], clips, count, SHAPE, lr=LR, loss=loss, bf16=True, label=name)
    parts = [
        equal_rate(models, videos),
        codebook({k: m for k, m in models.items() if "18 bits" in k}, videos),
        two_stages(options, models["FSQ, 18 bits"], clips, count, extra),
    ]
    crop = "x".join(map(str, SHAPE[1:]))
    body = (
        f"`python examples/claims_vidtok.py`: 4x4x4 pixels per position, six channels, {count} steps on "
        f"crops of {crop}; held "
        f"out: {len(videos)} clips of 17x64x64.\n\n" + "\n\n".join(text for text, _ in parts)
    )
    figure, axes = new_figure(len(parts))
    for ax, (_, draw) in zip(axes, parts, strict=True):
        draw(ax)
    publish(options, "vidtok", "VidTok: FSQ against KL at equal rate, codebook use, two stages", body, figure)
    return 0


def equal_rate(models: dict[str, VidTok], videos: Tensor) -> tuple[str, Draw]:
    """Both curves of PSNR over bits per position, and their distance at the middle FSQ model's rate."""
    rows, curves = [], {"FSQ": [], "KL": []}
    torch.manual_seed(0)
    for name, model in models.items():
        if name.endswith("alone"):
            continue
        kind = name.partition(",")[0]
        if kind == "FSQ":
            bits, scores = math.log2(model.regularization.codebook_size), (psnr(model, videos), "")
        else:
            bits, scores = (
                rate(model, videos),
                (psnr(functools.partial(sampled, model), videos), psnr(model, videos)),
            )
        rows.append((name, bits, *scores))
        curves[kind].append((bits, scores[0]))
    bits, score = curves["FSQ"][1]
    gaussian = interpolated(curves["KL"], bits)
    if gaussian is None:
        claim = f"The Gaussian models' rates do not enclose {bits:g} bits, so nothing can be said."
    else:
        claim = (
            f"At {bits:g} bits FSQ is {score - gaussian:+.2f} dB from the Gaussian's sample, which is "
            f"interpolated: the claim "
            f"that discrete tokens need not lose {'shows' if score > gaussian - 0.2 else 'does not show'} "
            f"at this size."
        )
    head = (
        "model",
        "bits per position, held out",
        "PSNR, dB",
        "of the mean, which that rate does not pay for",
    )

    def draw(ax) -> None:
        for name, points in curves.items():
            ax.plot(
                *zip(*sorted(points), strict=True),
                marker="o",
                label=name if name == "FSQ" else "KL, a sample",
            )
        ax.set(xlabel="bits per position, held out", ylabel="PSNR, dB")
        ax.legend()

    return f"### Equal rate\n\n{table(head, rows)}\n\n{claim}", draw


def interpolated(points: list[tuple[float, float]], at: float) -> float | None:
    """The value at `at` of the line through the two neighboring points (x, y); None outside of them."""
    points = sorted(points)
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= at <= x1 and x0 < x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return None


def codebook(models: dict[str, VidTok], videos: Tensor) -> tuple[str, Draw]:
    rows = []
    for name, model in models.items():
        indices = torch.cat([model.encode(video[None]).indices for video in videos])
        use = metrics.codebook_use(indices, model.regularization.codebook_size)
        digits = indices.unsqueeze(-1) // model.regularization.basis % 8
        per_channel = (
            sum(metrics.codebook_use(channel, 8).perplexity for channel in digits.flatten(0, -2).unbind(-1))
            / 6
        )
        rows.append(
            (
                name,
                f"{indices.numel():,}",
                f"{indices.unique().numel():,}",
                f"{use.perplexity:,.0f}",
                per_channel,
                psnr(model, videos),
            )
        )
    head = (
        "trained with",
        "tokens",
        "different ones",
        "perplexity",
        "levels in use per channel, of 8",
        "PSNR, dB",
    )
    text = (
        "### Codebook use\n\n"
        + table(head, rows)
        + "\n\nThe perplexity cannot exceed the number of tokens. Levels in use: "
        "the perplexity of one channel's levels, the mean over six."
    )
    return text, lambda ax: bars(ax, ("with its\nentropy loss", "without"), [row[4] for row in rows], head[4])


def two_stages(options, first: VidTok, clips, count: int, extra: int) -> tuple[str, Draw]:
    """`extra` more steps on small crops against extra/4 steps of the decoder alone on crops of four times the
    pixels."""
    videos, runs = held_out(options, 17, 96), {"stage 1 alone": (first, count, "all")}
    recipes = (
        ("single stage, small crops", SHAPE, "all", extra),
        ("single stage, large crops", LARGE, "all", extra // 4),
        ("stage 2: the decoder, large crops", LARGE, "decoder", extra // 4),
    )
    for name, shape, part, number in recipes:
        model = copy.deepcopy(first)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(part == "all" or key.startswith("decoder"))
        loss = plain_loss(aux=AUX if part == "all" else 0.0)
        train(model, clips, max(1, number), shape, lr=LR / 2, loss=loss, seed=1, bf16=True, label=name)
        runs[name] = (model, count + number, part)
    rows = [(name, number, part, psnr(model, videos)) for name, (model, number, part) in runs.items()]
    gains = [row[3] - rows[0][3] for row in rows]
    text = (
        f"### Two stages\n\nFrom the FSQ model above, the same number of pixels again: {extra} steps on "
        f"small crops, or "
        f"{extra // 4} on crops of {'x'.join(map(str, LARGE[1:]))}. Held out: {len(videos)} clips of "
        f"17x96x96.\n\n"
        + table(("recipe", "steps", "what learns at last", "PSNR, dB"), rows)
        + f"\n\nThe second stage gains {gains[3]:+.2f} dB, without a change of the tokens; the single "
        f"stages gain "
        f"{gains[1]:+.2f} and {gains[2]:+.2f}."
    )
    return text, lambda ax: bars(
        ax, ("stage 1", "small", "large", "stage 2"), [row[3] for row in rows], "PSNR, dB"
    )


if __name__ == "__main__":
    sys.exit(main())
