"""Streams, events and recordings of CUDA graphs without a GPU: what torch.cuda's functions were asked, in
order. Tensors are those of the CPU; a device may say "cuda"."""

from __future__ import annotations

import contextlib
import itertools
import threading

import torch

DEVICE = torch.device("cuda", 0)


class Event:
    def __init__(self, stream):
        self.stream = stream


class Stream:
    numbers = itertools.count(1)

    def __init__(self, cuda, *args, **kwargs):
        self.cuda, self.cuda_stream = cuda, next(self.numbers)

    def wait_stream(self, other):
        self.cuda.journal.append(("waits for stream", self, other))

    def wait_event(self, event):
        assert not self.cuda.recording, "work within a recording may not wait for what is not recorded"
        self.cuda.journal.append(("waits for event", self, event))

    def record_event(self):
        return Event(self)


class OnDevice:
    """A tensor that says that it is on a GPU, and knows who else uses it."""

    is_cuda = True

    def __init__(self):
        self.used_by = []

    def record_stream(self, stream):
        self.used_by.append(stream)


class FakeCuda:
    """``recording``: a CUDA graph is being recorded. ``current``: the stream of every thread but those that
    chose one with ``torch.cuda.stream``."""

    def __init__(self, monkeypatch):
        self.recording, self.journal, self.chosen = False, [], threading.local()
        self.current = Stream(self)
        replaced = {
            "is_available": lambda: True,
            "device": lambda device: contextlib.nullcontext(),
            "is_current_stream_capturing": lambda: self.recording,
            "current_stream": lambda device=None: getattr(self.chosen, "stream", self.current),
            "stream": self.on,
            "Stream": lambda *args, **kwargs: Stream(self),
        }
        for name, function in replaced.items():
            monkeypatch.setattr(torch.cuda, name, function)

    @contextlib.contextmanager
    def on(self, stream):
        before, self.chosen.stream = getattr(self.chosen, "stream", self.current), stream
        yield
        self.chosen.stream = before
