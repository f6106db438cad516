"""`vtok-fast check --models`: each tokenizer, accelerated, against itself with the reference ops, on a real
clip where one is.

What is compared: the tokens (those of a codebook by the rule of `parity.tokens`, latents by the *close*
contract), the video that is decoded from the reference's tokens, InfoTok's scores, and the gradients of a
whole pass. The models are the small configurations: VidTok's with the package's weights, the others with
random ones, none of them zero, so that nothing hides behind a zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.commands.check import Outcome
from vtok_fast.commands.demo import DEFAULT_VIDEO, WEIGHTS
from vtok_fast.io.tokens import Tokens
from vtok_fast.models import Cosmos, InfoTok, InfoTokConfig, ProMAG, TivTok, VidTok, VTok
from vtok_fast.models.common.regularizers import FSQRegularizer

FRAMES, SIZE = 9, (48, 64)
MODELS: dict[str, Callable[[], nn.Module]] = {
    "VidTok": lambda: VidTok.from_checkpoint(WEIGHTS),
    "Cosmos": lambda: Cosmos("tiny"),
    # All tokens: which ones a rate keeps may hang on the last bit of a score, and the scores are compared by
    # themselves.
    "InfoTok": lambda: InfoTok(
        InfoTokConfig(**{**InfoTokConfig.presets["tiny"], "rate": 1.0, "selection": "topk"})
    ),
    "TivTok": lambda: TivTok("tiny"),
    "VTok": lambda: VTok("tiny"),
    "ProMAG 4x": lambda: ProMAG("tiny"),
    "ProMAG 8x": lambda: ProMAG("tiny_8x"),
}


def real_clip(path: str | Path | None = None) -> tuple[Tensor, str]:
    """A video (1, 3, FRAMES, *SIZE) and what it is: of `path`, else of the demo's clip, else a smooth
    synthetic one.

    Raises what `read_video` raises for a path that was given.
    """
    if path is not None or DEFAULT_VIDEO.is_file():
        try:
            from vtok_fast.io.video import read_video

            video = read_video(DEFAULT_VIDEO if path is None else path, size=SIZE, frames=FRAMES).video
            video = torch.cat((video, video[:, -1:].expand(-1, FRAMES - video.shape[1], -1, -1)), 1)
            return video[None], str(path or DEFAULT_VIDEO)
        except ImportError:
            if path is not None:
                raise
    noise = torch.randn(1, 3, 3, 6, 6, generator=torch.Generator().manual_seed(0)).tanh()
    return nn.functional.interpolate(noise, size=(FRAMES, *SIZE), mode="trilinear"), "a synthetic clip"


def model_outcomes(video: Tensor, names: list[str] | None = None) -> Iterator[Outcome]:
    """Every comparison of every model (or of those named), as it is made, on a video (1, 3, T, H, W) in [-1,
    1].

    Raises ValueError for an unknown name.
    """
    if unknown := sorted({*(names or ())} - {*MODELS}):
        raise ValueError(f"names={unknown}: the models are {', '.join(MODELS)}")
    for name in names or MODELS:
        torch.manual_seed(0)
        yield from _compare(name, _nowhere_zero(MODELS[name]()).eval(), video)


def _compare(name: str, model: nn.Module, video: Tensor) -> Iterator[Outcome]:
    double = copy.deepcopy(model).double()
    wide = video.double()
    with vtok_fast.backend("reference"):
        eager_z, eager = _tokens(model, video)
        double_z, ref64 = _tokens(double, wide)
        pixels = model.decode(eager), double.decode(_as_float64(eager))
        scores = (model.scores(video), double.scores(wide)) if isinstance(model, InfoTok) else None
        gradients = _gradients(model, video), _gradients(double, wide)
    report = vtok_fast.accelerate(model)
    for entry in report.skipped:
        if entry.error is not None:  # it was swapped, and the swap taken back
            yield Outcome(name, "auto", entry.path, False, entry.error, entry.bound, entry.why)
    fast_z, fast = _tokens(model, video)
    flips = 0
    if fast.indices is None:
        yield _close(name, "latents", fast.latents, ref64.latents, eager.latents)
    else:
        tokens = parity.tokens(fast_z, eager_z, double_z, _levels(model))
        flips = tokens.total - tokens.equal + tokens.flips + tokens.eager_flips
        yield Outcome(name, "auto", "tokens", tokens.ok, text=str(tokens))
    yield _close(name, "decoded video", model.decode(eager), pixels[1], pixels[0])
    if scores is not None:
        yield _close(name, "router's scores", model.scores(video), scores[1], scores[0])
    if flips:
        yield Outcome(
            name,
            "auto",
            "gradients",
            True,
            skipped=f"{flips} tokens differ, and with them what is differentiated",
        )
    else:
        yield _close_gradients(
            name, _gradients(model, video), gradients[1], gradients[0], len(report.swapped)
        )
    report.revert()


def _close(name: str, case: str, fast: Tensor, ref64: Tensor, eager: Tensor) -> Outcome:
    measured = parity.close(fast, ref64, eager)
    return Outcome(name, "auto", case, measured.ok, measured.error, measured.bound, str(measured))


def _close_gradients(
    name: str, fast: dict[str, Tensor], ref64: dict[str, Tensor], eager: dict[str, Tensor], swaps: int
) -> Outcome:
    """A gradient has come through all swapped layers, each of which may have the floor of the contract for an
    error; they are independent, so sqrt(swaps) floors are allowed, or twice what the worst gradient has
    without swaps."""
    norms = {key: grad.norm().item() for key, grad in ref64.items()}
    total, elements = (
        sum(norm**2 for norm in norms.values()) ** 0.5,
        sum(grad.numel() for grad in ref64.values()),
    )
    # As for the regions of an output, one gradient is a region of all: where it is smaller than its share of
    # the norm, that is its scale. (That of a key's bias before a softmax is zero by the maths, that of a
    # key's weight almost, where all keys are alike.)
    scales = {key: max(norm, total * (ref64[key].numel() / elements) ** 0.5) for key, norm in norms.items()}
    errors, eager_errors = (
        {key: (grads[key].double() - ref64[key]).norm().item() / scales[key] for key in ref64}
        for grads in (fast, eager)
    )
    bound = max(2 * max(eager_errors.values()), parity.floor(torch.float32) * max(1, swaps) ** 0.5)
    worst = max(errors, key=errors.get)
    ok = errors[worst] <= bound
    return Outcome(
        name,
        "auto",
        f"{len(errors)} gradients",
        ok,
        errors[worst],
        bound,
        f"{errors[worst]:.2e} of {bound:.2e} allowed ({worst})",
    )


@torch.no_grad()
def _tokens(model: nn.Module, video: Tensor) -> tuple[Tensor | None, Tokens]:
    """What the last quantizer to run was given (None without one), and the tokens."""
    seen: list[Tensor] = []
    handles = [
        m.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        for m in model.modules()
        if isinstance(m, FSQRegularizer)
    ]
    try:
        tokens = model.encode(video)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1] if seen else None, tokens


def _levels(model: nn.Module) -> tuple[int, ...]:
    return next(m.levels for m in model.modules() if isinstance(m, FSQRegularizer))


def _as_float64(tokens: Tokens) -> Tokens:
    latents = None if tokens.latents is None else tokens.latents.double()
    return replace(tokens, dtype=torch.float64, latents=latents)


def _gradients(model: nn.Module, video: Tensor) -> dict[str, Tensor]:
    """Of the mean square of the reconstruction, by the video and by every parameter that it reaches."""
    video = video.clone().requires_grad_()
    inputs = {"video": video, **{key: p for key, p in model.named_parameters() if p.requires_grad}}
    grads = torch.autograd.grad(model(video).square().mean(), list(inputs.values()), allow_unused=True)
    return {key: grad for key, grad in zip(inputs, grads, strict=True) if grad is not None}


def _nowhere_zero(model: nn.Module) -> nn.Module:
    """Small random values for every parameter that starts as zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model
