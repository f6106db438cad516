"""Check models against golden files: weights, inputs, and the outputs of the official code for them.

    PYTHONPATH=tests python -m support.golden [--backend B] [--algorithm direct|winograd2|winograd4] FILE...

What to build and run is read from each file's metadata. Per case it prints the worst error as a part of its
tolerance. Exit code: 0 if all is within tolerance, 1 if not, 2 for a file that cannot be checked (unreadable,
    of a system or part unknown here).

Every backend but "reference" swaps the layers by `vtok_fast.accelerate` first. tests/golden_data/README.md
describes the format.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TOLERANCE = 1e-5  # relative norm error of a float32 computation; the official code itself stays within 3e-6
# The module beside this file that checks each system: check(golden, accelerate) -> iterator of Checks.
SYSTEMS = {
    "VidTok": "support.golden_vidtok",
    "Cosmos tokenizer": "support.golden_cosmos",
    "InfoTok": "support.golden_infotok",
}


class Unsupported(ValueError):
    """A file that this program cannot check."""


@dataclass(frozen=True)
class Check:
    """One comparison: `error` must be at most `tolerance`."""

    case: str
    what: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # false for NaN

    @property
    def severity(self) -> float:
        """The error as a part of the tolerance; infinite for any difference where none is allowed."""
        if self.tolerance:
            return self.error / self.tolerance if self.error == self.error else float("inf")
        return 0.0 if self.passed else float("inf")


@dataclass(frozen=True)
class Golden:
    """A golden file: `meta` as in its header, and its tensors by key."""

    path: Path
    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, path: str | os.PathLike) -> Golden:
        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {})["meta"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise Unsupported(
                f"{path}: not a readable golden file ({type(error).__name__}: {error})"
            ) from error
        return cls(
            Path(path),
            meta,
            {key: value.float() if value.dtype == torch.float16 else value for key, value in tensors.items()},
        )

    @property
    def cases(self) -> dict[str, dict[str, Any]]:
        return self.meta["cases"]

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose keys start with `prefix`/, without it."""
        return {
            key[len(prefix) + 1 :]: value
            for key, value in self.tensors.items()
            if key.startswith(prefix + "/")
        }

    def weights(self, prefix: str = "weights") -> dict[str, Tensor]:
        return {key: value.float() for key, value in self.under(prefix).items()}


def close(case: str, what: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> Check:
    """norm(actual - expected)/norm(expected); infinite for another shape."""
    if actual.shape != expected.shape:
        return Check(
            case,
            f"{what} shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}",
            float("inf"),
            tolerance,
        )
    difference = (actual.double() - expected.double()).norm().item()
    norm = expected.double().norm().item()
    return Check(case, what, difference / norm if norm else difference, tolerance)


def same(case: str, what: str, actual: Tensor, expected: Tensor) -> Check:
    """The number of entries that differ; none may."""
    if actual.shape != expected.shape:
        return Check(
            case, f"{what} shape {tuple(actual.shape)}, wanted {tuple(expected.shape)}", float("inf"), 0.0
        )
    return Check(case, what, float((actual != expected).sum()), 0.0)


def accelerator(
    backend: str, algorithm: str | None
) -> Callable[[torch.nn.Module], contextlib.AbstractContextManager]:
    """A function whose result is a context in which a module runs on that backend."""
    if backend == "reference":
        return lambda module: contextlib.nullcontext()

    import vtok_fast

    @contextlib.contextmanager
    def accelerated(module: torch.nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(vtok_fast.backend(backend))
            if algorithm is not None:
                stack.enter_context(vtok_fast.algorithm(algorithm))
            report = vtok_fast.accelerate(module, check=False)
            try:
                yield
            finally:
                report.revert()

    return accelerated


def check_file(
    path: str | os.PathLike, backend: str = "reference", algorithm: str | None = None
) -> list[Check]:
    """All comparisons of one file. Raises Unsupported for a file that this program cannot check."""
    golden = Golden.load(path)
    system = golden.meta.get("system")
    if system not in SYSTEMS:
        raise Unsupported(f"{path}: system {system!r} is unknown here; known: {', '.join(SYSTEMS)}")
    accelerate = accelerator(backend, algorithm)
    try:
        checks = list(importlib.import_module(SYSTEMS[system]).check(golden, accelerate))
    except (KeyError, ValueError, RuntimeError) as error:
        raise Unsupported(f"{path}: {type(error).__name__}: {error}") from error
    if not checks:
        raise Unsupported(f"{path}: holds nothing to compare")
    return checks


def summary(checks: list[Check]) -> Iterator[str]:
    """One line per case: the worst comparison, and how many there are."""
    for case in dict.fromkeys(check.case for check in checks):
        group = [check for check in checks if check.case == case]
        worst = max(group, key=lambda check: check.severity)
        failed = [check for check in group if not check.passed]
        yield (
            f"  {'FAIL' if failed else 'ok':4}  {case:34} worst {worst.what}: {worst.error:.2e} of "
            f"{worst.tolerance:.0e}"
            f"  ({len(group) - len(failed)} of {len(group)} within)"
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--backend", default="reference", help="default: %(default)s, the plain model")
    parser.add_argument(
        "--algorithm", choices=("direct", "winograd2", "winograd4"), help="of the convolutions"
    )
    options = parser.parse_args(arguments)
    if options.backend == "reference" and options.algorithm is not None:
        parser.error("--algorithm needs a --backend other than reference")
    code = 0
    for path in options.files:
        print(path)
        try:
            checks = check_file(path, options.backend, options.algorithm)
        except Unsupported as error:
            print(f"  cannot check: {error}", file=sys.stderr)
            code = 2
            continue
        for line in summary(checks):
            print(line)
        if code == 0 and not all(check.passed for check in checks):
            code = 1
    return code


if __name__ == "__main__":
    # The modules of the systems import this one under its name
    sys.modules["support.golden"] = sys.modules["__main__"]
    sys.exit(main())
