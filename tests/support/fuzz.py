"""Feeds nonsense to what takes input from outside: `python tests/support/fuzz.py TARGET --seconds 600 [--seed
N]`.

Targets:
    native   the entry points of vtok_fast._C, with tensors whose memory is real and whose shapes, strides,
    types and options are
             not what belongs together. They may refuse with an exception; under ASan and UBSan (`make fuzz`)
             any access outside of the tensors ends the process.
    packed   PackedTokens.from_bytes, with damaged bytes, also under a right checksum.
    tokens   Tokens.load, the same.
    results  the reader of benchmark results.

Each case has a number and is made from `seed + number` alone, so `--seed S --cases 1` repeats one. What a
target raises beyond the exceptions that its docstring promises ends the run with the case's number. Prints
the counts; exit code 1 for a failure.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import vtok_fast
from support import another_native  # noqa: F401 -- the build under test, before vtok_fast looks for its own
from vtok_fast.bench import report
from vtok_fast.dispatch import native
from vtok_fast.io import tokens

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8)
NUMBERS = (0, 1, -1, 2, 3, 7, 2**15, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63), 2**63 - 1)


SEED, LAST = (Path(tempfile.gettempdir()) / f"vtok-fuzz.{what}" for what in ("seed", "call"))


class Wrong(Exception):
    """The target took what it should not, or gave back what it was not given."""


# ---- the native module -------------------------------------------------------------------------------------


def native_calls(r: random.Random) -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """Sensible calls of every entry point, for `mutated` to spoil."""
    lib = native.lib()
    threads = r.choice((1, 1, 2, 3))
    b, c, t, h, w = (
        r.choice((1, 2)),
        r.choice((1, 3, 8, 17)),
        r.randint(1, 4),
        r.randint(1, 9),
        r.randint(1, 9),
    )
    dtype = r.choice(DTYPES[:3])
    x = _video(r, (b, c, t, h, w), dtype)
    kernel = r.choice(((1, 1, 1), (1, 3, 3), (3, 3, 3), (2, 1, 3)))
    stride, dilation = (
        r.choice(((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 1, 3))),
        r.choice(((1, 1, 1), (1, 1, 1), (2, 1, 2))),
    )
    upsample, once = r.choice(((1, 1, 1), (1, 1, 1), (1, 2, 2), (2, 2, 1))), r.random() < 0.3
    groups = c if c < 9 and r.random() < 0.2 else 1
    o, pad = (
        groups * r.choice((1, 4, 16)),
        [kernel[0] - 1, 0, kernel[1] // 2, kernel[1] // 2, kernel[2] // 2, kernel[2] // 2],
    )
    size = [
        (n * up - (once and i == 0) * (up - 1) + pad[2 * i] + pad[2 * i + 1] - d * (k - 1) - 1) // step + 1
        for i, (n, up, d, k, step) in enumerate(zip((t, h, w), upsample, dilation, kernel, stride))
    ]
    if min(size) > 0:
        weight, bias = torch.randn(o, c // groups, *kernel).to(dtype), torch.randn(o).to(dtype)
        out = torch.empty(b, o, *size, dtype=dtype, memory_format=torch.channels_last_3d)
        cache = None if once else r.choice((None, _video(r, (b, c, r.randint(1, 2), h, w), dtype)))
        residual = r.choice((None, torch.randn_like(out)))
        geometry = (stride, dilation, groups, tuple(pad), r.randint(0, 2), r.randint(0, 2), upsample, once)
        yield (
            lib.causal_conv3d,
            [
                x,
                weight,
                r.choice((None, bias)),
                cache,
                residual,
                out,
                geometry,
                r.choice((None, 0.5)),
                r.random() < 0.5,
                r.choice((0, 1, 2, 4)),
                threads,
            ],
        )
        yield lib.causal_conv3d_choice, [x, weight, out, geometry, threads]
    yield lib.set_weight_cache, [r.choice((0, 1, 2**20, 2**40))]
    last, centered, over_positions, per_frame = (r.random() < 0.5 for _ in range(4))
    x = x.contiguous(memory_format=torch.channels_last_3d if last else torch.contiguous_format)
    more = [r.choice((None, torch.randn(c))) for _ in range(2)] + [
        r.choice((None, torch.randn_like(x))) for _ in range(3)
    ]
    yield (
        lib.norm_act,
        [
            x,
            *more,
            torch.empty_like(x),
            last,
            centered,
            over_positions,
            per_frame,
            r.choice((1, c)),
            1e-6,
            r.random() < 0.5,
            threads,
        ],
    )
    levels = [r.choice((2, 3, 5, 8, 64)) for _ in range(r.randint(1, 6))]
    z = _video(r, (b, len(levels), t, h, w), dtype)
    table = torch.full((len(levels), max(levels) - 1), torch.inf)  # in the rows of fewer levels
    for row, count in zip(table, levels):
        row[: count - 1] = torch.linspace(-1, 1, count - 1)
    yield (
        lib.fsq_quantize,
        [z, torch.empty_like(z), torch.empty(b, t, h, w, dtype=torch.int32), table, levels, 1, threads],
    )
    # A token's sizes, and how many
    grid, tokens_of = (
        [r.randint(1, 3) for _ in range(3)],
        [r.randint(1, 4) for _ in range(3)],
    )
    sizes = [n * m for n, m in zip(grid, tokens_of)]
    video = _video(r, (b, c, sizes[0] - grid[0] + 1, *sizes[1:]), dtype)
    yield lib.router_scores, [video, torch.randn_like(video), torch.empty(b, *tokens_of), *grid, threads]
    n = r.choice((0, 1, 5, 300))
    scores, keep = torch.randn(b, n), torch.rand(b, n) < 0.5
    yield (
        lib.select_tokens,
        [scores, torch.full((b,), n // 2, dtype=torch.int64), keep.view(torch.uint8), False, threads],
    )
    mask = (torch.rand(b, n) < 0.5).view(torch.uint8)
    yield lib.count_tokens, [mask, torch.empty(b + 1, dtype=torch.int32), threads]
    values, dense = torch.randn(int(mask.sum()), c).to(dtype), torch.randn(b, n, c).to(dtype).transpose(1, 2)
    yield lib.pack_tokens, [dense, mask, values, torch.empty(len(values), dtype=torch.int32), threads]
    yield lib.unpack_tokens, [values, mask, torch.zeros(1, dtype=dtype), dense, threads]


def _video(r: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(shape).to(dtype)
    return r.choice(
        (
            x,
            x.contiguous(memory_format=torch.channels_last_3d),
            x.transpose(3, 4).contiguous().transpose(3, 4),
        )
    )


def mutated(r: random.Random, arguments: list[Any]) -> list[Any]:
    """The same call with up to three arguments replaced by others of the same kind."""
    arguments = list(arguments)
    for _ in range(r.choice((0, 1, 1, 2, 3))):
        i = r.randrange(len(arguments))
        arguments[i] = _other(r, arguments[i])
    return arguments


def _other(r: random.Random, value: Any) -> Any:
    if isinstance(value, torch.Tensor) or value is None:
        shape = list(value.shape) if value is not None else [r.randint(0, 3) for _ in range(r.randint(0, 6))]
        dtype = value.dtype if value is not None else torch.float32
        match r.randint(0, 5):
            case 0 if shape:
                shape[r.randrange(len(shape))] += r.choice((-1, 1, 2))
            case 1:
                shape.insert(r.randint(0, len(shape)), r.randint(0, 3))
            case 2 if shape:
                shape.pop(r.randrange(len(shape)))
            case 3:
                dtype = r.choice(DTYPES)
            case 4:
                return None
            case _:
                r.shuffle(shape)
        x = torch.ones([max(n, 0) for n in shape[:7]], dtype=dtype)
        return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 and r.random() < 0.3 else x
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice((*NUMBERS, value + 1, value - 1))
    if isinstance(value, float):
        return r.choice((0.0, -1.0, 1e30, float("nan"), float("inf")))
    if isinstance(value, (list, tuple)):
        items = list(value)
        if items:
            i = r.randrange(len(items))
            one = isinstance(items[i], (tuple, bool))  # an item of a geometry
            items[i] = _other(r, items[i]) if one else r.choice((*NUMBERS, 1, 2, 4))
        if r.random() < 0.1:
            items.append(1)
        return type(value)(items)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}/{value.stride()}"


def fuzz_native(r: random.Random) -> str:
    native.lib().set_isa(r.choice(native.lib().supported_isas()))
    call, arguments = r.choice(list(native_calls(r)))
    arguments = mutated(r, arguments)
    LAST.write_text(" ".join([call.__name__, *map(_text, arguments)]) + "\n")  # should the process end here
    try:
        call(*[native.arg(a) if isinstance(a, torch.Tensor) else a for a in arguments])
    except (ValueError, NotImplementedError, TypeError, OverflowError, MemoryError, RuntimeError) as error:
        return f"{call.__name__} refused: {type(error).__name__}"
    return f"{call.__name__} ran"


# ---- readers -----------------------------------------------------------------------------------------------


def damaged(r: random.Random, data: bytes) -> bytes:
    """The bytes with a few of them changed, cut out, repeated or replaced by extreme numbers."""
    out = bytearray(data)
    for _ in range(r.randint(1, 6)):
        at = r.randint(0, len(out))
        match r.randint(0, 4):
            case 0 if out:
                out[at % len(out)] ^= 1 << r.randrange(8)
            case 1:
                del out[at : at + r.randint(1, 9)]
            case 2:
                out[at:at] = out[max(at - r.randint(1, 20), 0) : at]
            case 3:
                number = r.choice((0, 1, 2, 255, 2**16, 2**31, 2**32 - 1))
                out[at : at + 4] = struct.pack("<I", number)
            case _:
                out[at : at + 1] = bytes([r.randrange(256)])
    return bytes(out)


def fuzz_packed(r: random.Random) -> str:
    b, grid = r.randint(1, 3), tuple(r.randint(0, 4) for _ in range(r.randint(1, 3)))
    codes = r.choice((1, 2, 5, 64, 4096, 2**31))
    keep = torch.rand(b, *grid) < 0.6
    packed = vtok_fast.pack_tokens(torch.randint(0, codes, (b, *grid), dtype=torch.int64).int(), keep)
    data = packed.to_bytes(codes)
    back = vtok_fast.PackedTokens.from_bytes(data)
    if not torch.equal(back.values, packed.values) or not torch.equal(back.mask, packed.mask):
        raise Wrong("from_bytes(to_bytes(x)) is not x")
    spoiled = damaged(r, data)
    if r.random() < 0.7:  # under a right checksum
        spoiled = spoiled[:-4] + struct.pack("<I", zlib.crc32(spoiled[:-4]))
    try:
        result = vtok_fast.PackedTokens.from_bytes(spoiled)
    except ValueError:
        return "refused"
    kept = int(result.mask.sum())
    if len(result.values) != kept or len(result.indices) != kept or int(result.cu_seqlens[-1]) != kept:
        raise Wrong(
            f"{kept} positions, {len(result.values)} values, {len(result.indices)} indices, "
            f"{result.cu_seqlens[-1]} in all"
        )
    return "taken"


FOLDER = tempfile.TemporaryDirectory()


def fuzz_tokens(r: random.Random) -> str:
    path = Path(FOLDER.name) / "x.tokens"
    indices = torch.randint(0, 99, (1, 2, r.randint(1, 3), 2), dtype=torch.int32)
    good = tokens.Tokens(
        "VidTok", {"name": "tiny"}, (5, 16, 16), torch.float32, indices=indices, info={"fps": 25}
    )
    good.save(path)
    if r.random() < 0.4:
        path.write_bytes(damaged(r, path.read_bytes()))
    else:  # a file that is sound in itself, with a header of somebody else's making
        header: Any = {
            "model": "VidTok",
            "config": {},
            "video_shape": [5, 16, 16],
            "dtype": "float32",
            "kind": "indices",
            "info": {},
        }
        other = r.choice(
            (
                None,
                -1,
                0,
                "",
                "float32",
                "load",
                "__dict__",
                [],
                [1],
                {},
                {"a": 1},
                1e400,
                [[0]] * 3,
                "latents",
                "model",
            )
        )
        if r.random() < 0.7:
            header[r.choice(list(header))] = other
        if r.random() < 0.2:
            header.pop(r.choice(list(header)))
        text = r.choice(
            (
                json.dumps(header),
                json.dumps(header),
                json.dumps(other),
                "[" * 9999,
                json.dumps(header)[:-3],
                "",
            )
        )
        shape = [r.randint(0, 3) for _ in range(r.randint(0, 5))]
        data = r.choice((indices, indices.float(), torch.zeros(shape, dtype=r.choice((*DTYPES, torch.bool)))))
        if r.random() < 0.3:  # the packed stream inside, damaged under a right checksum
            stream = damaged(r, vtok_fast.pack_tokens(indices, indices > 30).to_bytes(99))[:-4]
            data = torch.frombuffer(
                bytearray(stream + struct.pack("<I", zlib.crc32(stream))), dtype=torch.uint8
            )
            text = json.dumps(header | {"kind": "packed"})
        values = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        digest = hashlib.sha256(text.encode() + f"{data.dtype}{tuple(data.shape)}".encode() + values)
        metadata = {"format": tokens.FORMAT, "tokens": text, "sha256": digest.hexdigest()}
        save_file({r.choice(("tokens", "tokens", "tokens", "x")): data}, path, metadata)
    try:
        loaded = tokens.Tokens.load(path)
    except ValueError:
        return "refused"
    if (
        not isinstance(loaded.dtype, torch.dtype)
        or not isinstance(loaded.config, dict)
        or not isinstance(loaded.model, str)
    ):
        raise Wrong(f"loaded {loaded!r}")
    return "taken"


def fuzz_results(r: random.Random) -> str:
    path = Path(FOLDER.name) / "results.json"
    good = json.dumps(
        {
            "version": report.VERSION,
            "machine": {"cpu": "x", "cores": 2},
            "sections": {"fsq": {"cases": [1.5, None]}},
        }
    )
    path.write_bytes(
        r.choice(
            (
                damaged(r, good.encode()),
                b"[" * r.randint(1, 100_000),
                b"\xff\xfe" + good.encode(),
                b"",
                b"1e999",
                b"{}",
            )
        )
    )
    try:
        report.load(path)
    except ValueError:
        return "refused"
    return "taken"


TARGETS = {"native": fuzz_native, "packed": fuzz_packed, "tokens": fuzz_tokens, "results": fuzz_results}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--cases", type=int, default=10**12)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    options = parser.parse_args()
    outcomes: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + options.seconds
    for case in range(options.cases):
        if time.monotonic() > end:
            break
        seed = options.seed + case
        if options.target == "native":
            SEED.write_text(f"{seed}\n")
        torch.manual_seed(seed)
        try:
            outcomes[TARGETS[options.target](random.Random(seed))] += 1
        except Exception:
            traceback.print_exc()
            print(f"{options.target}: failed; repeat with --seed {seed} --cases 1")
            return 1
    print(f"{options.target}: {sum(outcomes.values())} cases from seed {options.seed}: {dict(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
