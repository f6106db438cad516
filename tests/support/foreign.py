"""The native module's entry points on another machine's processor.

`record FILE ROUNDS` runs the fuzzer's sound calls on this machine's portable kernels and keeps arguments and
results; `replay FILE TO MODULE` runs them on a module given as a file, with nothing but Python's standard
library; `compare FILE TO` says where the two differ: not at all where the contract is *exact*, else by at
most the sum of what *close* allows each.
"""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import pickle
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

EXACT = {"fsq_quantize", "router_scores", "select_tokens", "count_tokens", "pack_tokens", "unpack_tokens"}
CLOSE = {"causal_conv3d", "norm_act"}
ALIGNED = 64


class Memory(NamedTuple):
    """A tensor: its type, sizes and strides as the module takes them, its place in bytes, and the bytes."""

    dtype: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int
    data: bytes


class Call(NamedTuple):
    name: str
    arguments: list[Any]
    result: Any
    after: dict[int, bytes]  # by number of the argument, those of a tensor


def record(file: Path, rounds: int) -> None:
    import torch

    from support import fuzz
    from vtok_fast.dispatch import native

    native.lib().set_isa("portable")
    calls = []
    for seed in range(rounds):
        torch.manual_seed(seed)
        for function, arguments in fuzz.native_calls(random.Random(seed)):
            if function.__name__ not in EXACT | CLOSE:
                continue
            encoded = [memory(a) if isinstance(a, torch.Tensor) else a for a in arguments]
            try:
                result = function(*[native.arg(a) if isinstance(a, torch.Tensor) else a for a in arguments])
            except ValueError:
                continue  # pads too wide for `reflect`
            after = {i: memory(a).data for i, a in enumerate(arguments) if isinstance(a, torch.Tensor)}
            calls.append(Call(function.__name__, encoded, result, after))
    file.write_bytes(
        pickle.dumps([(c.name, [plain(a) for a in c.arguments], c.result, c.after) for c in calls])
    )


def memory(tensor: Any) -> Memory:
    from vtok_fast.dispatch import native

    _, dtype, size, stride = native.arg(tensor)
    storage = tensor.untyped_storage()
    data = ctypes.string_at(storage.data_ptr(), storage.nbytes()) if storage.nbytes() else b""
    start = tensor.storage_offset() * tensor.element_size()
    return Memory(dtype, tuple(size), tuple(stride), start, data)


def plain(argument: Any) -> Any:
    """An argument as the other Python reads it, which has neither torch nor this package."""
    if isinstance(argument, Memory):
        return "memory", tuple(argument)
    return tuple(argument) if isinstance(argument, tuple) else argument


def read(file: Path) -> list[Call]:
    def argument(a: Any) -> Any:
        return Memory(*a[1]) if isinstance(a, tuple) and len(a) == 2 and a[0] == "memory" else a

    return [
        Call(name, [argument(a) for a in arguments], result, after)
        for name, arguments, result, after in pickle.loads(file.read_bytes())
    ]


def replay(file: Path, to: Path, module: Path) -> None:
    spec = importlib.util.spec_from_file_location("vtok_fast._C", module)
    assert spec is not None and spec.loader is not None
    lib = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lib)
    results = []
    for call in read(file):
        places, arguments = {}, []
        for i, a in enumerate(call.arguments):
            if isinstance(a, Memory):
                buffer = ctypes.create_string_buffer(len(a.data) + ALIGNED)
                begin = -ctypes.addressof(buffer) % ALIGNED + ctypes.addressof(buffer)
                ctypes.memmove(begin, a.data, len(a.data))
                places[i] = (buffer, begin, len(a.data))
                a = (begin + a.start, a.dtype, a.size, a.stride)
            arguments.append(a)
        result = getattr(lib, call.name)(*arguments)
        results.append((result, {i: ctypes.string_at(at, length) for i, (_, at, length) in places.items()}))
    to.write_bytes(pickle.dumps((lib.isa(), results)))


def compare(file: Path, to: Path) -> str:
    """What was compared. Raises AssertionError where a result is not what it must be."""
    import torch

    from vtok_fast import parity

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    isa, results = pickle.loads(to.read_bytes())
    calls = read(file)
    assert len(calls) == len(results) > 0
    seen, worst = collections.Counter(), collections.defaultdict(float)
    for number, (call, (result, after)) in enumerate(zip(calls, results)):
        seen[call.name] += 1
        assert result == call.result, f"call {number}, {call.name}: {result}, here {call.result}"
        for i, data in after.items():
            if data == call.after[i]:
                continue
            assert call.name in CLOSE, f"call {number}, {call.name}: argument {i} has other bytes"
            tensor: Memory = call.arguments[i]
            there, here = (
                torch.frombuffer(bytearray(d), dtype=dtypes[tensor.dtype]).double()
                for d in (data, call.after[i])
            )
            error = ((there - here).norm() / here.norm()).item()
            bound = 2 * parity.floor(dtypes[tensor.dtype])
            worst[call.name] = max(worst[call.name], error / bound)
            assert error <= bound, f"call {number}, {call.name}: {error:.2e} of {bound:.2e} allowed"
    assert set(seen) == EXACT | CLOSE, seen
    parts = [
        f"{name}: {count} calls, " + (f"{worst[name]:.2f} of what is allowed" if name in CLOSE else "equal")
        for name, count in sorted(seen.items())
    ]
    return f"{isa}: " + "; ".join(parts)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "record":
        record(Path(words[0]), int(words[1]))
    elif what == "replay":
        replay(*map(Path, words))
    else:
        print(compare(*map(Path, words)))
