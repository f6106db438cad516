"""How the backends of ``fsq`` are compared: indices and codes are exact."""

from __future__ import annotations

from collections.abc import Iterator

from vtok_fast import parity
from vtok_fast.commands.checks.compare import DTYPES, Outcome, random
from vtok_fast.ops.fsq import fsq_quantize


def exactly(op: str, backend: str) -> Iterator[Outcome]:
    for levels in ((8, 8, 8, 8, 8), (8, 5, 5, 5), (2, 3)):
        for label, dtype in DTYPES.items():
            z = (2 * random(1, len(levels), 4, 24, 24)).to(dtype)
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


CHECKS = {"fsq": exactly}
