"""How the backends of ``causal_conv3d`` are compared."""

from __future__ import annotations

from torch import Tensor

from vtok_fast.commands.checks.compare import Cases, closely, random
from vtok_fast.ops.causal_conv3d import causal_conv3d


def cases() -> Cases:
    def layer(
        inputs: int, outputs: int, kernel: tuple[int, int, int], size: tuple[int, int, int]
    ) -> tuple[Tensor, ...]:
        fan_in = inputs * kernel[0] * kernel[1] * kernel[2]
        return (
            random(1, inputs, *size),
            random(outputs, inputs, *kernel, seed=1) * fan_in**-0.5,
            random(outputs, seed=2),
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
        "with a cache": (layer(16, 16, cube, (3, 12, 15)), {"cache": random(1, 16, 2, 12, 15, seed=3)}),
        "reflected borders": (layer(16, 16, cube, (3, 14, 11)), {"spatial_mode": "reflect"}),
    }


CHECKS = {"causal_conv3d": lambda op, backend: closely(op, backend, causal_conv3d, cases())}
