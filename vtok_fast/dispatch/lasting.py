"""Tensors that outlive the call that first needs them: tables, plans and flags.

On a GPU three things may happen to such a tensor that do not happen to the others. A CUDA graph is being
recorded: memory belongs to the graph, and copies from the host are read again at each replay. It is about to
be recorded: ``torch.compile(mode="reduce-overhead")`` runs a call once with the graph's memory, chosen by
stream and by thread, and without recording. Or another stream uses it, before it is filled or after it is
freed. So it is made in a thread and on a stream of its own, whoever uses it waits for that, and nothing is
kept while a graph is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def lasting() -> Iterator[None]:
    """Tensors made within the block are ordinary ones, on the CPU unless they name a device: the first call
    may run under ``inference_mode``, another default device or a mode of fake tensors, and later ones may
    not. Give their dtype."""
    with _disable_current_modes(), torch.inference_mode(False), torch.device("cpu"):
        yield


def is_recording(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_recording(device: torch.device, what: str) -> None:
    """Raises RuntimeError where a CUDA graph is being recorded, which cannot make what later calls use, nor
    read again what the host holds only now."""
    if is_recording(device):
        raise RuntimeError(
            f"{what} must be made on {device} before a CUDA graph is recorded: run the call once before"
        )


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype, what: str) -> Tensor:
    """``values`` on the device, without waiting for it. Raises RuntimeError where they are on the host while
    a CUDA graph is recorded: each replay would read memory that is long freed."""
    if values.is_cpu and device.type != "cpu":
        refuse_recording(device, what)
    return values.to(device, dtype, non_blocking=values.is_cpu)


class Kept:
    """What was made once, when it is ready, and the streams that know."""

    __slots__ = ("ready", "streams", "value")

    def __init__(self, value: Any, ready: Any) -> None:
        self.value, self.ready, self.streams = value, ready, set[int]()


def keep(store: dict[Any, Any], key: Any, device: torch.device, make: Callable[[], Any]) -> Any:
    """``make()``, kept in ``store`` for all later calls on whatever stream; made anew and not kept while a
    CUDA graph is recorded. What a recorded graph reads must live as long as the graph: whoever owns the store
    sees to it."""
    found = store.get(key)
    if found is None:
        if is_recording(device):
            with lasting():
                return make()
        found = store.setdefault(key, _made(device, make))
    if found.ready is not None:
        _known_to_stream(found, torch.cuda.current_stream(device), device)
    return found.value


def _made(device: torch.device, make: Callable[[], Any]) -> Kept:
    if device.type != "cuda":
        with lasting():
            return Kept(make(), None)
    current = torch.cuda.current_stream(device)

    def make_elsewhere() -> Kept:
        with lasting(), torch.cuda.device(device):
            stream = next(s for s in _streams(device) if s.cuda_stream != current.cuda_stream)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                return Kept(make(), stream.record_event())

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make_elsewhere).result()


@functools.cache
def _streams(device: torch.device) -> tuple[Any, Any]:
    """Two, one of which is not the current one; of high priority, which are seldom anybody else's."""
    first = torch.cuda.Stream(device, priority=-1)
    return first, torch.cuda.Stream(device, priority=-1)


def _known_to_stream(kept: Kept, stream: Any, device: torch.device) -> None:
    """The stream waits until the value is ready, and its memory is used for nothing else before the stream
    has done with it."""
    if stream.cuda_stream in kept.streams:
        return
    for t in _tensors(kept.value):
        t.record_stream(stream)
    if is_recording(device):  # what was made before a recording was waited for when it began
        return
    stream.wait_event(kept.ready)
    kept.streams.add(stream.cuda_stream)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those on a GPU, in tuples and in scopes."""
    value = getattr(value, "csr", value)
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif getattr(value, "is_cuda", False):
        yield value
