"""Paths of inputs and outputs. Nothing here needs torch: a command looks at them first."""

from __future__ import annotations

import os


def check_distinct(output: str | os.PathLike, **inputs: str | os.PathLike | None) -> None:
    """Raises ValueError if `output` is one of the inputs, by whatever path or link: it would be lost."""
    for name, path in inputs.items():
        try:
            same = path is not None and os.path.samefile(output, path)
        except OSError:  # one of them is not there
            continue
        if same:
            raise ValueError(f"output: {output} is the same file as {name}={path}, which would be lost")
