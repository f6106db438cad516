"""`vtok-fast check`: each op and a whole VidTok on this machine, against the reference, by the contracts of
`parity`.

Inputs are random but the same every time. Every backend that can run here is asked for by name, so nothing
falls back in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_fast import parity
from vtok_fast.dispatch.available import available_backends
from vtok_fast.dispatch.backends import BackendError
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.fsq import fsq_quantize
from vtok_fast.ops.norm_act import norm_act
from vtok_fast.ops.scope_attention import scope_attention
from vtok_fast.ops.scope_attention.scope import Scope

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Outcome:
    """One comparison. `skipped` says why there was none; then `ok` is true and the numbers are None."""

    op: str
    backend: str
    case: str
    ok: bool
    error: float | None = None
    bound: float | None = None
    text: str = ""
    skipped: str | None = None


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _conv_cases() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    """Names, (x, weight, bias), options."""

    def layer(
        inputs: int, outputs: int, kernel: tuple[int, int, int], size: tuple[int, int, int]
    ) -> tuple[Tensor, ...]:
        fan_in = inputs * kernel[0] * kernel[1] * kernel[2]
        return (
            _random(1, inputs, *size),
            _random(outputs, inputs, *kernel, seed=1) * fan_in**-0.5,
            _random(outputs, seed=2),
        )

    plane, cube = (1, 3, 3), (3, 3, 3)
    return {
        "3x3x3": (layer(32, 48, cube, (5, 20, 28)), {}),
        "3x3x3, first frame repeated, SiLU": (
            layer(16, 16, cube, (4, 17, 19)),
            {"time_mode": "replicate", "activation": "silu"},
        ),
        "1x3x3": (layer(24, 40, plane, (3, 33, 30)), {}),
        "3x1x1": (layer(32, 32, (3, 1, 1), (6, 9, 11)), {}),
        "1x1x1": (layer(48, 16, (1, 1, 1), (2, 13, 8)), {}),
        "3 channels in": (layer(3, 32, cube, (5, 18, 21)), {}),
        "stride 2": (
            layer(16, 24, cube, (5, 16, 18)),
            {"stride": (2, 2, 2), "spatial_pad": ((0, 1), (0, 1))},
        ),
        "upsampled": (layer(16, 16, plane, (2, 12, 10)), {"upsample": (1, 2, 2)}),
        "with a cache": (layer(16, 16, cube, (3, 12, 15)), {"cache": _random(1, 16, 2, 12, 15, seed=3)}),
        "reflected borders": (layer(16, 16, cube, (3, 14, 11)), {"spatial_mode": "reflect"}),
    }


def _norm_cases() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    x = _random(1, 64, 3, 9, 14) + 0.5
    affine = (_random(64, seed=1), _random(64, seed=2))
    return {
        "layer, SiLU": ((x, *affine), {"kind": "layer", "activation": "silu"}),
        "rms, SiLU": ((x, *affine), {"kind": "rms", "activation": "silu"}),
        "group": ((x, *affine), {"kind": "group", "groups": 32}),
        "group per frame, SiLU": (
            (x, *affine),
            {"kind": "group", "groups": 32, "per_frame": True, "activation": "silu"},
        ),
    }


def _scope_cases() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    scopes = {
        "time invariant": Scope.time_invariant(tiv=24, tv=4, patches=64, slices=3),
        "block causal": Scope.block_causal(4, 50),
        "packed": Scope.packed([0, 70, 70, 200], q_len=210),
    }
    return {
        name: (tuple(_random(1, 4, scope.q_len, 32, seed=i) for i in range(3)), {"scope": scope})
        for name, scope in scopes.items()
    }


def outcomes() -> Iterator[Outcome]:
    """Every comparison, as it is made."""
    for op, backends in available_backends().items():
        for backend, missing in backends.items():
            if backend == "reference":
                continue
            if missing is not None:
                yield Outcome(op, backend, "all", True, skipped=missing)
            elif op in CHECKS:
                yield from CHECKS[op](op, backend)
    yield from _vidtok()


def _closely(
    op: str, backend: str, function: Callable[..., Tensor], cases: dict[str, tuple]
) -> Iterator[Outcome]:
    for name, (tensors, options) in cases.items():
        for label, dtype in DTYPES.items():

            def run(dtype: torch.dtype, source: torch.dtype, backend: str) -> Tensor:
                # The float64 reference gets the very numbers that the narrow type can hold.
                args = [t.to(source).to(dtype) for t in tensors]
                more = {k: v.to(source).to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
                return function(*args, **more, backend=backend)

            try:
                fast = run(dtype, dtype, backend)
            except BackendError as error:
                yield Outcome(op, backend, f"{name}, {label}", True, skipped=str(error))
                continue
            measured = parity.close(
                fast, run(torch.float64, dtype, "reference"), run(dtype, dtype, "reference")
            )
            yield Outcome(
                op, backend, f"{name}, {label}", measured.ok, measured.error, measured.bound, str(measured)
            )


def _fsq(op: str, backend: str) -> Iterator[Outcome]:
    for levels in ((8, 8, 8, 8, 8), (8, 5, 5, 5), (2, 3)):
        for label, dtype in DTYPES.items():
            z = (2 * _random(1, len(levels), 4, 24, 24)).to(dtype)
            fast, reference = (
                fsq_quantize(z, levels, backend=backend),
                fsq_quantize(z, levels, backend="reference"),
            )
            for what in ("indices", "codes"):
                measured = parity.exact(getattr(fast, what), getattr(reference, what))
                yield Outcome(
                    op,
                    backend,
                    f"{what} of levels {'x'.join(map(str, levels))}, {label}",
                    measured.ok,
                    measured.error,
                    0.0,
                    str(measured),
                )


# How each op's backends are compared with the reference.
CHECKS: dict[str, Callable[[str, str], Iterator[Outcome]]] = {
    "causal_conv3d": lambda op, backend: _closely(op, backend, causal_conv3d, _conv_cases()),
    "norm_act": lambda op, backend: _closely(op, backend, norm_act, _norm_cases()),
    "scope_attention": lambda op, backend: _closely(op, backend, scope_attention, _scope_cases()),
    "fsq": _fsq,
}


def _vidtok() -> Iterator[Outcome]:
    """The small VidTok of the package, accelerated as a user would."""
    import vtok_fast
    from vtok_fast.commands.demo import WEIGHTS
    from vtok_fast.models import VidTok

    model = VidTok.from_checkpoint(WEIGHTS).eval()
    video = torch.nn.functional.interpolate(_random(1, 3, 3, 6, 6).tanh(), size=(9, 48, 64), mode="trilinear")
    with torch.no_grad():
        eager, double = copy.deepcopy(model), copy.deepcopy(model).double()
        report = vtok_fast.accelerate(model)
        for entry in report.skipped:
            if entry.error is not None:  # it was swapped, and the swap taken back
                yield Outcome("accelerate", "auto", entry.path, False, entry.error, entry.bound, entry.why)
        latents = [
            m.encoder(video.to(d))
            for m, d in ((model, torch.float32), (eager, torch.float32), (double, torch.float64))
        ]
        measured = parity.close(latents[0], latents[2], latents[1])
        yield Outcome("VidTok", "auto", "encoder", measured.ok, measured.error, measured.bound, str(measured))
        tokens = parity.tokens(*latents, model.config.levels)
        yield Outcome("VidTok", "auto", "tokens", tokens.ok, text=str(tokens))
        codes = eager.regularization(latents[1]).codes
        measured = parity.close(model.decoder(codes), double.decoder(codes.double()), eager.decoder(codes))
        yield Outcome("VidTok", "auto", "decoder", measured.ok, measured.error, measured.bound, str(measured))
