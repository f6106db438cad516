"""InfoTok's claim in miniature: tokens chosen by the router against tokens chosen without looking.

    python examples/claims_infotok.py

One model learns to use all tokens; copies of it are then trained on, which differ only in how they drop
tokens, at InfoTok-Flex's rates: "router" keeps those whose pixels a full decode gets most wrong, "latent
difference" those whose latents change most from frame to frame, "fixed" the first ones of every frame in
reading order, "uniform" evenly strided ones. All are decoded at the paper's rates, 0.8 and 0.56 of the
tokens, beside others.
"""

from __future__ import annotations

import copy
import sys

import torch
from miniature import arguments, held_out, new_figure, psnr, publish, steps, table, train, training_clips
from torch import Tensor, nn
from train import reconstruction_error

from vtok_fast.models import InfoTok

SHAPE = (1, 17, 48, 48)
RATES = (1.0, 0.8, 0.56, 0.4, 0.25)
EVERYTHING = {"rate": 1.0, "router": "even", "selection": "topk"}
WAYS = {
    "router": {"router": "decode", "selection": "topk"},
    "latent difference": {"router": "latent", "selection": "topk"},
    "fixed": {"router": "even", "selection": "order"},
    "uniform": {"router": "even", "selection": "order_strided"},
}


def dropping(choice: dict) -> nn.Module:
    def loss(model: InfoTok, x: Tensor, step: int) -> Tensor:
        return reconstruction_error(model.reconstruct(x, step=step, **choice).video, x)

    return loss


def main(argv: list[str] | None = None) -> int:
    options = arguments(__doc__, argv)
    clips, videos = training_clips(options), held_out(options, 17, 48, clips=12)
    first, second = steps(options, 2500), steps(options, 600)
    torch.manual_seed(0)
    base = InfoTok("tiny")
    train(base, clips, first, SHAPE, lr=2e-3, loss=dropping(EVERYTHING), label="all tokens")
    scores, models = {}, {}
    for name, choice in WAYS.items():
        models[name] = model = copy.deepcopy(base)
        train(model, clips, second, SHAPE, lr=1e-3, loss=dropping(choice), seed=1, label=name)
        scores[name] = [psnr(lambda v: model(v, rate=rate, **choice), videos) for rate in RATES]  # noqa: B023 (called at once)
    bits = [bits_per_token(models["router"], videos, rate, WAYS["router"]) for rate in RATES]
    before = psnr(lambda v: base(v, **EVERYTHING), videos)
    rows = [
        (f"{rate:g}", f"{bits[i]:.2f}", *[scores[name][i] for name in scores]) for i, rate in enumerate(RATES)
    ]
    router = scores["router"]
    gains = {other: [router[i] - scores[other][i] for i in (1, 2)] for other in ("fixed", "uniform")}
    claim = "shows" if min(map(min, gains.values())) > 0 else "does not show"
    body = (
        f"`python examples/claims_infotok.py`: 4x8x8 pixels per token, 64,000 codes; {first} steps with all "
        f"tokens, then "
        f"{second} for each way on crops of {'x'.join(map(str, SHAPE[1:]))}, one of the shares 0.25, 0.5, "
        f"0.75 and 1 at each. "
        f"Held out: {len(videos)} clips of that size; PSNR in dB. Bits: of the packed stream with its mask, "
        f"per position.\n\n"
        + table(("share of tokens", "bits", *scores), rows)
        + f"\n\nBefore it learnt to drop any, the model had {before:.2f} dB. The router is "
        + " and ".join(
            f"{at8:+.2f} dB from {other} dropping at 0.8, {at5:+.2f} at 0.56"
            for other, (at8, at5) in gains.items()
        )
        + f": its claim {claim} at this size. From all tokens to 0.8 of them it loses "
        f"{router[0] - router[1]:.2f} dB (the "
        "paper: nothing)."
    )
    figure, axes = new_figure()
    for name, values in scores.items():
        axes.plot(RATES, values, marker="o", label=name)
    axes.set(xlabel="share of tokens kept", ylabel="PSNR of held-out frames, dB")
    axes.legend()
    publish(options, "infotok", "InfoTok: the router against fixed and uniform dropping", body, figure)
    return 0


def bits_per_token(model: InfoTok, videos: Tensor, rate: float, choice: dict) -> float:
    from vtok_fast import metrics

    tokens = model.encode(videos[:1], rate=rate, **choice)
    return metrics.bits(tokens, model.codebook_size) / tokens.indices.numel()


if __name__ == "__main__":
    sys.exit(main())
