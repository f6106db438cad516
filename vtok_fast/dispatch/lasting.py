"""Tensors that outlive the call that first needs them: tables, plans and flags."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made within the block are ordinary ones, on the CPU unless they name a device: the first call
    may run under ``inference_mode`` or another default device, and later ones may not. Give their dtype."""
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded, whose memory is not filled yet and belongs to the graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_recording(device: torch.device, what: str) -> None:
    """Raises RuntimeError where a CUDA graph is being recorded, which cannot make what later calls use."""
    if is_recording(device):
        raise RuntimeError(
            f"{what} must be made on {device} before a CUDA graph is recorded: run the call once before"
        )


def stream_key(device: torch.device) -> Any:
    """What tells apart tensors that different streams of a device fill: a stream may not read what another
    has not finished. None on other devices."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
