"""How the backends of ``norm_act`` are compared."""

from __future__ import annotations

from vtok_fast.commands.checks.compare import Cases, closely, random
from vtok_fast.ops.norm_act import norm_act


def cases() -> Cases:
    x = random(1, 64, 3, 9, 14) + 0.5
    affine = (random(64, seed=1), random(64, seed=2))
    return {
        "layer, SiLU": ((x, *affine), {"kind": "layer", "activation": "silu"}),
        "rms, SiLU": ((x, *affine), {"kind": "rms", "activation": "silu"}),
        "group": ((x, *affine), {"kind": "group", "groups": 32}),
        "group per frame, SiLU": (
            (x, *affine),
            {"kind": "group", "groups": 32, "per_frame": True, "activation": "silu"},
        ),
    }


CHECKS = {"norm_act": lambda op, backend: closely(op, backend, norm_act, cases())}
