"""One sample of a call's time: by the clock on a CPU, by CUDA events on a GPU.

On a GPU every timed call finds the L2 cache filled with other data and, where they are small, other copies of
its inputs than the call before: a kernel in a model seldom finds its inputs in the cache. The pass that fills
the cache also gives the host the time to queue the call's launches, so that their cost is not measured unless
they take longer than it; ``host_seconds`` says how long the host needs. A replay of the call as a CUDA graph
(``graph_seconds``, where it is asked for) has no launches of the host at all.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


class HostTimer:
    """Wall-clock time of a call that returns when it is done."""

    def __init__(self) -> None:
        self._faults: dict[str, list[float]] = defaultdict(list)

    def calls(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Call]:
        return [partial(function, *inputs) if inputs else function]

    def reset(self) -> None:
        self._faults.clear()

    def sample(self, calls: Sequence[Call], repeats: int, name: str = "") -> float:
        """Seconds per call, the mean over ``repeats``."""
        call, before = calls[0], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = (time.perf_counter() - start) / repeats
        self._faults[name].append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / repeats)
        return seconds

    def extras(self, name: str, call: Call) -> dict[str, Any]:
        return {"page_faults": statistics.fmean(self._faults[name])}


class DeviceTimer:
    """Time between two CUDA events around each call. ``cuda`` is ``torch.cuda``, or in tests what stands in
    for it."""

    MOST_SETS = 8
    LEAST_FLUSH = 256 << 20  # bytes
    MOST_REPEATS = 50
    REPLAYS = 25

    def __init__(self, device: str, cuda: Any = torch.cuda, *, graphs: bool = False) -> None:
        self._cuda, self._next, self._graphs = cuda, 0, graphs
        self._cache = int(getattr(cuda.get_device_properties(device), "L2_cache_size", 0)) or 64 << 20
        self._flush = torch.zeros(
            max(2 * self._cache, self.LEAST_FLUSH) // 4, dtype=torch.float32, device=device
        )
        self._host: dict[str, list[float]] = defaultdict(list)

    def calls(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Call]:
        """The call with as many copies of its inputs as fill the cache twice, at most ``MOST_SETS``."""
        size = sum(t.numel() * t.element_size() for t in inputs if isinstance(t, Tensor))
        sets = min(self.MOST_SETS, -(-2 * self._cache // size)) if size else 1
        return [
            partial(function, *(twin(t) if i and isinstance(t, Tensor) else t for t in inputs))
            for i in range(sets)
        ]

    def reset(self) -> None:
        self._host.clear()

    def sample(self, calls: Sequence[Call], repeats: int, name: str = "") -> float:
        """Seconds per call, the median over ``repeats``, at most ``MOST_REPEATS``."""
        pairs, host = [], []
        for _ in range(min(repeats, self.MOST_REPEATS)):
            call = calls[self._next % len(calls)]
            self._next += 1
            start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.sum()  # reads: lines that were only read need no writing back while the call runs
            start.record()
            begin = time.perf_counter()
            call()
            host.append(time.perf_counter() - begin)
            end.record()
            pairs.append((start, end))
        self._cuda.synchronize()
        self._host[name].append(statistics.median(host))
        return statistics.median(start.elapsed_time(end) for start, end in pairs) * 1e-3

    def extras(self, name: str, call: Call) -> dict[str, Any]:
        """What one call takes of torch's allocator at its peak, its result included; the host's time per
        call; and the seconds of a replay, or why there is no graph."""
        self._cuda.synchronize()
        self._cuda.reset_peak_memory_stats()
        before = self._cuda.memory_allocated()
        call()
        self._cuda.synchronize()
        found = {
            "peak_bytes": self._cuda.max_memory_allocated() - before,
            "host_seconds": statistics.median(self._host[name]),
        }
        return found | (self._replayed(call) if self._graphs else {})

    def _replayed(self, call: Call) -> dict[str, Any]:
        """A call that waits for the device, or allocates outside of torch's allocator, cannot be captured."""
        graph, side = self._cuda.CUDAGraph(), self._cuda.Stream()
        try:
            side.wait_stream(self._cuda.current_stream())
            # As capture wants it: what is made at a first call is made on another stream
            with self._cuda.stream(side):
                call()
            self._cuda.current_stream().wait_stream(side)
            with self._cuda.graph(graph):
                held = call()  # the graph's memory lives as long as what is in it
        except Exception as error:  # whatever the driver and the libraries of peers may say
            self._cuda.synchronize()
            return {"no_graph": (str(error).strip().splitlines() or [type(error).__name__])[0][:200]}
        host, self._host = self._host, defaultdict(list)
        seconds = self.sample([graph.replay], self.REPLAYS)
        self._host = host
        del held
        return {"graph_seconds": seconds}


def twin(tensor: Tensor) -> Tensor:
    """A copy with the same strides, also where the tensor is part of a larger one, or an expanded one."""
    once = tensor[tuple(slice(1 if step == 0 else None) for step in tensor.stride())]
    copy = torch.empty_strided(once.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(
        once
    )
    return copy.expand(tensor.shape)
