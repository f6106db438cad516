"""ProMAG's claim in miniature: an 8x model grown from a 4x one against one that is trained for 8x directly.

    python examples/claims_promag.py

The 4x model is trained, grown by `ProMAG.grow()`, and its new parts are trained on. The direct model gets as
many steps as both together. Beside them: the 4x model on every second frame (what the grown model starts
from; every frame is shown twice), because the paper starts from the observation that this beats a model
trained for the higher compression.
"""

from __future__ import annotations

import sys

import torch
from miniature import (
    arguments,
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
from train import smoothed

from vtok_fast.models import ProMAG

SHAPE = (1, 17, 32, 32)
BASE = {"ch": 8, "ch_mult": (1, 2, 4, 4), "num_res_blocks": 1, "mid_blocks": 1, "groups": 4, "z_channels": 8}
DIRECT = {**BASE, "strides": ((2, 2, 2), (2, 2, 2), (2, 2, 2))}


def every_second(model: ProMAG, video: Tensor) -> Tensor:
    """The lower model on frames 0, 2, 4, ...; each one except the first is shown twice."""
    return model(video[:, :, ::2]).repeat_interleave(2, dim=2)[:, :, 1:]


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    clips, videos = training_clips(options), held_out(options, 17, 64)
    first, second = steps(options, 1500), steps(options, 1000)
    loss, lr = plain_loss(aux=1e-6), 2e-3

    torch.manual_seed(0)
    base = ProMAG(BASE)
    curve = train(base, clips, first, SHAPE, lr=lr, loss=loss, bf16=True, label="4x")
    grown = base.grow()
    before = psnr(grown, videos)
    grown_curve = train(
        grown, clips, second, SHAPE, lr=lr / 2, loss=loss, seed=1, bf16=True, label="grown 8x"
    )
    torch.manual_seed(0)
    direct = ProMAG(DIRECT)
    direct_curve = train(direct, clips, first + second, SHAPE, lr=lr, loss=loss, bf16=True, label="direct 8x")

    def row(name: str, model: ProMAG, count: int, score: float | None = None, frames: int = 17) -> tuple:
        positions, parameters = (
            model.num_tokens(frames, *videos.shape[3:]),
            sum(p.numel() for p in model.parameters()),
        )
        return name, positions, count, f"{parameters:,}", psnr(model, videos) if score is None else score

    half = psnr(lambda v: every_second(base, v), videos)
    rows = [
        row("4x", base, first),
        row("4x on every second frame, shown twice", base, first, half, frames=9),
        row("8x grown, before training", grown, first, before),
        row("8x grown", grown, first + second),
        row("8x direct", direct, first + second),
    ]
    difference = rows[3][-1] - rows[4][-1]
    body = (
        f"`python examples/claims_promag.py`: 17 frames of 64x64 (trained on 32x32), latents of 8 channels, "
        f"{first} steps for "
        f"4x, then {second} for what growing adds; {first + second} for the direct one. Held-out clips: "
        f"{len(videos)}.\n\n"
        + table(("model", "latent positions", "steps", "parameters", "PSNR, dB"), rows)
        + f"\n\n{verdict(difference)}"
    )
    figure, axes = new_figure()
    for name, values, start in (
        ("4x", curve, 0),
        ("8x grown", grown_curve, first),
        ("8x direct", direct_curve, 0),
    ):
        at, means = smoothed(values, 40)
        axes.plot([start + step for step in at], means, label=name)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend()
    publish(options, "promag", "ProMAG: grown 8x against direct 8x", body, figure)
    return 0


def verdict(difference: float) -> str:
    if abs(difference) < 0.2:
        return (
            f"At this size the two 8x models do not differ ({difference:+.2f} dB for the grown one): "
            "the claim does not show."
        )
    return (
        f"The grown model is {abs(difference):.2f} dB {'better' if difference > 0 else 'worse'} than the "
        f"direct one: the claim "
        f"{'shows' if difference > 0 else 'does not show'} at this size."
    )


if __name__ == "__main__":
    sys.exit(main())
