"""What several commands share: the readers of option values, and where output goes. torch is imported only
by the functions that need it."""

from __future__ import annotations

import contextlib
import json
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import torch

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]

Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what is there already.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def stdout_for_json(as_json: bool) -> AbstractContextManager[Any]:
    """While standard output is reserved for JSON, progress goes to standard error."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def numbers(text: str | None, name: str) -> tuple[int, ...] | None:
    """``"1,128,17"`` or ``"1x128x17"`` as integers. Raises ValueError naming the option."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise ValueError(f"{name}={text!r}: expected whole numbers with commas between them") from None


def pixels(text: str) -> int | tuple[int, int]:
    """``"256x448"`` as (height, width), ``"256"`` as one number. Raises ValueError for anything else."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise ValueError(f"size={text!r}: expected HxW or a number of pixels, such as 256x448 or 256")
    return int(parts[0]) if len(parts) == 1 else (int(parts[0]), int(parts[1]))


def dtype_of(name: str | None) -> torch.dtype | None:
    """fp32, bf16 or fp16 (or torch's own name) as a dtype; None for None. Raises ValueError for others."""
    import torch

    known = {
        "fp32": torch.float32,
        "float32": torch.float32,
        "bf16": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
    }
    if name is not None and name not in known:
        raise ValueError(f"dtype={name!r}: expected one of fp32, bf16, fp16")
    return None if name is None else known[name]


def default_device() -> str:
    """A GPU if there is one, otherwise the CPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_of(name: str | None) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:N``; None: `default_device()`. Raises ValueError for an unknown name
    and for a GPU that is not here."""
    import torch

    try:
        device = torch.device(name or default_device())
    except RuntimeError as error:
        raise ValueError(f"device={name!r}: expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}: there are {torch.cuda.device_count()} CUDA GPUs here")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: expected cpu, cuda or cuda:N")
    return device
