"""How many operations ours does, where that is fewer than the definition's: Winograd's F(m x m, 3x3) takes
(m + 2)^2 products for each tile of m x m outputs, where the definition takes 9 m^2.

A roofline counts what is done. What is saved makes a kernel faster than the roof of the definition's
operations, and is said as such.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtok_fast.bench import harness
from vtok_fast.dispatch import native

TILES = {"winograd2": 2, "winograd4": 4}


def share(algorithm: str, height: int | None = None, width: int | None = None) -> float:
    """Operations done for each of the definition's, on planes of height x width outputs: tiles over the
    border are whole. Without a size, of planes that the tiles divide."""
    if algorithm not in TILES:
        return 1.0
    m = TILES[algorithm]
    h, w = height or m, width or m
    return -(-h // m) * -(-w // m) * (m + 2) ** 2 / (9 * h * w)


def done(facts: dict[str, Any]) -> float | None:
    """GFLOP that ours does in a case; None where operations are not counted."""
    if not facts.get("gflop"):
        return None
    counted = facts.get("done_gflop")  # results files of before have the algorithm only
    return facts["gflop"] * share(facts.get("algorithm", "")) if counted is None else counted


def saved_gflop(run: Callable[[], Any]) -> float:
    """What Winograd saves in the convolutions of ``run()``, on a CPU."""
    saved = 0.0

    def note(op: str, call: Any, backend: Any) -> None:
        nonlocal saved
        if op != "causal_conv3d" or backend.name != "cpu":
            return
        from vtok_fast.ops.causal_conv3d import cpu

        out = call.empty_output(depth_to_space=(1, 1, 1), device="meta")
        algorithm = cpu._algorithm(call)
        if algorithm == "auto":
            x, weight = ((0, *native.arg(t)[1:]) for t in (call.x, call.weight))
            isa = native.lib().isa()
            algorithm = cpu._choice(x, weight, call.geometry, native.threads(), isa)
        whole = 2e-9 * out.numel() * call.weight[0].numel()
        saved += whole * (1 - share(algorithm, *out.shape[3:]))

    with harness.selections(note):
        run()
    return saved
