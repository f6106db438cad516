"""One comparison of a backend with the reference, by the contracts of `parity`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtok_fast import parity
from vtok_fast.dispatch.backends import BackendError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Cases = dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]  # by name: tensors and options


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


def random(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def closely(op: str, backend: str, function: Callable[..., Tensor], cases: Cases) -> Iterator[Outcome]:
    """Each case in each of `DTYPES` by the contract *close*."""
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
