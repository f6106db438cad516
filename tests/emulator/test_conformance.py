"""conformance.cu and conformance_sm90.cu word for word: in the emulator, and on a GPU where there is one,
against the layouts that the PTX manual draws."""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
from support import emulator  # noqa: E402

LANES = range(32)
VALUES = 2048
WORDS = 12 * 32 + 3 * 128 + 6 * 32 + 64 + 3 * VALUES
COPIED = 12 * 32 + 3 * 128 + 6 * 32


def matrices():
    """Lane l holds row l // 4, elements 2 (l % 4) and the next, of matrix i; of its transpose where it is
    transposed."""
    for count, transposed in ((4, False), (4, True), (2, False), (2, True)):
        for i in range(count):
            matrix = 64 * i + np.arange(64).reshape(8, 8)
            matrix = matrix.T if transposed else matrix
            for lane in LANES:
                low, high = matrix[lane // 4, lane % 4 * 2 :][:2]
                yield int(low) | int(high) << 16


def integer(lane, operand, i, half):
    return (lane * 7 + i * 13 + half * 5 + operand * 3 + lane * lane * i) % 9 - 4


def products(wide, k):
    """d + a b with a, b, d put together from the registers: groups of four lanes are rows of a and d and
    columns of b."""
    a, b, d = np.full((16, k), 99), np.full((k, 8), 99), np.full((16, 8), 99)
    for lane in LANES:
        group, within = divmod(lane, 4)
        for half in range(wide):
            column = within * wide + half
            a[group, column], a[group + 8, column] = integer(lane, 0, 0, half), integer(lane, 0, 1, half)
            a[group, column + k // 2], a[group + 8, column + k // 2] = (
                integer(lane, 0, 2, half),
                integer(lane, 0, 3, half),
            )
            b[column, group], b[column + k // 2, group] = integer(lane, 1, 0, half), integer(lane, 1, 1, half)
        d[group, 2 * within], d[group, 2 * within + 1] = integer(lane, 2, 0, 0), integer(lane, 2, 1, 0)
        d[group + 8, 2 * within], d[group + 8, 2 * within + 1] = (
            integer(lane, 2, 2, 0),
            integer(lane, 2, 3, 0),
        )
    d = d + a @ b
    for row, column in ((0, 0), (0, 1), (8, 0), (8, 1)):
        yield from (int(d[lane // 4 + row, lane % 4 * 2 + column]) & 0xFFFFFFFF for lane in LANES)


def exchanges():
    sources = (
        lambda n: n ^ 9,
        lambda n: n ^ 17 if (n ^ 17) // 16 <= n // 16 else n,
        lambda n: n // 8 * 8 + 3,
        lambda n: n + 5 if n + 5 < 32 else n,
        lambda n: n - 3 if n % 16 >= 3 else n,
    )
    for source in sources:
        yield from (100 + source(lane) for lane in LANES)
    yield from [sum(1 << lane for lane in LANES if lane % 3 == 1)] * 32


def copies():
    zeros = {8, 9, 10, 11, 18, 19, 30}
    yield from (0 if i in zeros else 2 * (i + 1) for i in LANES)
    for i in range(32):
        yield struct.unpack("<I", struct.pack("<f", 0.5 + (16 * i + 6 if i < 8 else 0)))[0]


def conversions():
    i = np.arange(VALUES, dtype=np.uint64)
    bits = ((i * 2654435761) & 0xFFFFFFFF).astype(np.uint32)
    value = torch.from_numpy(bits.view(np.float32))
    small = torch.from_numpy(
        (((bits >> 8).astype(np.int64) - (1 << 23)) / 2.0 ** (i // 2 % 31)).astype(np.float32)
    )
    half = torch.where(torch.from_numpy(i % 2 == 1), value, small).half()
    sixteen = [
        np.where(v.isnan(), 0x7FFF, v.view(torch.int16).numpy().view(np.uint16))
        for v in (value.bfloat16(), half)
    ]
    # To the nearest of 10 mantissa bits, ties away from zero: in float64, where half a unit can be added to
    # the size.
    with np.errstate(all="ignore"):
        exact = value.numpy().astype(np.float64)
        wide = np.abs(exact)
        unit = 2.0 ** (np.maximum(np.floor(np.log2(np.where(wide > 0, wide, 1))), -126) - 10)
        tf32 = np.where(np.isfinite(wide), np.floor(wide / unit + 0.5) * unit * np.sign(exact), 0).astype(
            np.float32
        )
    tf32 = np.where(
        value.isnan() | value.isinf(), bits & 0xFFFFE000, tf32.view(np.uint32) | bits & 0x80000000
    )
    back = np.where(half.isnan(), 0x7FFFFFFF, half.float().numpy().view(np.uint32))
    for a, b, c, d in zip(*sixteen, tf32, back):
        yield from (int(a) | int(b) << 16, int(c), int(d))


TENSOR = np.arange(1, 80 * 7 * 5 + 1).reshape(5, 7, 80)


def box(at, swizzle):
    """Rows of W bytes; the 16-byte chunk c of row r lies at chunk c ^ (r W / 128 % (W / 16)) of its row,
    except for swizzle 0."""
    padded = np.zeros((5 + 8, 7 + 8, 80 + 64), dtype=np.int64)
    padded[:5, 4:11, :80] = TENSOR
    x, y, z = at
    width = swizzle or 32
    rows = padded[z : z + 6, 4 + y : 4 + y + 3, x : x + width // 2].reshape(18, width // 16, 8)
    for r, row in enumerate(rows):
        for chunk in range(width // 16):
            place = chunk ^ (r * width // 128 % (width // 16)) if swizzle else chunk
            yield from (int(low) | int(high) << 16 for low, high in row[place].reshape(4, 2))


def boxes():
    for swizzle in (128, 64, 32, 0):
        yield from box((40, -1, 2), swizzle)


def warpgroup_products(columns=64, depth=64):
    r = np.arange(64)[:, None]
    n = np.arange(columns)[:, None]
    k = np.arange(depth)[None]
    yield from registers(((3 * r + 5 * k) % 7 - 3) @ ((2 * n + 11 * k) % 9 - 4).T)


def registers(c):
    """Of a warpgroup that holds these sums and has begun with its threads' numbers."""
    for i in range(c.shape[1] // 2):
        for t in range(128):
            yield (
                int(c[t // 32 * 16 + t % 32 // 4 + i // 2 % 2 * 8, i // 4 * 8 + t % 4 * 2 + i % 2] + t)
                & 0xFFFFFFFF
            )


def taps():
    r, k = np.arange(64)[:, None], np.arange(64)[None]
    left = (3 * r + 5 * k) % 7 - 3
    n = np.arange(192)[:, None]
    line = (k // 8 * 2 + n // 64) * 8 + k % 8
    yield from registers(left @ ((2 * (n % 64) + 11 * line) % 9 - 4).T)
    yield from registers(left.sum(1, keepdims=True) * np.ones((1, 8), dtype=int))


def stored_matrices():
    """Row r, elements c, of matrix i: from lane 4 r + c // 2; of its transpose, from lane 4 c + r // 2."""
    for transposed in (False, True):
        for i in range(4):
            for r in range(8):
                pair = [(c, r) if transposed else (r, c) for c in range(8)]
                halves = [(4 * row + column // 2) << 8 | i << 4 | column % 2 for row, column in pair]
                yield from (halves[c] | halves[c + 1] << 16 for c in range(0, 8, 2))


def clusters():
    for rank in (0, 1):
        for y in (0, 1):
            yield from box((0, y, 0), 128)
        yield from ((rank ^ 1) * 1000 + t for t in range(128))
    stored = np.full((5, 7, 80), 0xFFFF)
    stored[2:, 5:, 40:] = TENSOR[:3, :2, :40]
    yield from (int(low) | int(high) << 16 for low, high in stored.reshape(-1, 2))


FIVE = np.arange(1, 16 * 9 * 6 * 4 * 3 + 1).reshape(3, 4, 6, 9, 16)


def words_of(rows):
    yield from (int(low) | int(high) << 16 for low, high in np.asarray(rows).reshape(-1, 2))


def boxes_of_five():
    """Zeros wherever any of the five coordinates is out of bounds; of a stepped box every step-th element,
    counted from its corner, be that out of bounds or not."""

    def row(w, h, t, b):
        inside = 0 <= w < 9 and 0 <= h < 6 and 0 <= t < 4 and 0 <= b < 3
        return FIVE[b, t, h, w] if inside else np.zeros(16, dtype=int)

    for w, h, t, b in ((-1, 1, -1, 0), (2, -1, 4, 1), (7, 4, 3, 2), (0, 0, 1, -1), (0, 0, 1, 3)):
        for i in range(3):
            for j in range(4):
                yield from words_of(row(w + j, h + i, t, b))
    for step in (2, 4, 8):
        for i in range(2):
            for j in range(2):
                yield from words_of(row(-1 + j * step, -1 + i * step, 2, 1))


def stored_boxes():
    for width in (32, 16):
        stored = np.full((5, 7, 80), 0xFFFF)
        box = 100 * np.arange(18).reshape(6, 3, 1) + np.arange(width)
        stored[2:, 5:, 40 : 40 + width] = box[:3, :2]
        yield from words_of(stored)


def wide_products():
    for columns in (96, 112, 128, 144, 160, 192, 160, 256, 256):
        yield from warpgroup_products(columns)


def narrow_products():
    for columns in (64, 96, 112, 128, 144, 160):
        yield from warpgroup_products(columns, 128)


def narrowed():
    i = torch.arange(512)
    value = (i * 37 % 2048 - 1024).float() / 2.0 ** (i % 13)
    yield from value.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().view("<u4").tolist()


def halves():
    """Line r, chunk c, at chunk c ^ r % 8."""
    lines = np.arange(1, 80 * 35 + 1).reshape(35, 80)[:32, :64].reshape(32, 8, 8)
    swizzled = np.stack([line[np.arange(8) ^ r % 8] for r, line in enumerate(lines)])
    for _ in range(2):
        yield from words_of(swizzled)


PARTS = {
    "matrices": matrices,
    "bf16 products": lambda: products(2, 16),
    "fp16 products": lambda: products(2, 16),
    "tf32 products": lambda: products(1, 8),
    "exchanges": exchanges,
    "copies": copies,
    "conversions": conversions,
}
PARTS_SM90 = {
    "boxes": boxes,
    "products": warpgroup_products,
    "products from registers": warpgroup_products,
    "transposed products": lambda: warpgroup_products(128),
    "taps": taps,
    "stored matrices": stored_matrices,
    "clusters": clusters,
}
PARTS_SM90_MORE = {
    "boxes of five axes": boxes_of_five,
    "stored boxes": stored_boxes,
    "products of every width": wide_products,
    "products in e4m3": narrow_products,
    "rounded to e4m3": narrowed,
    "weights in halves": halves,
    "moved registers": lambda: (7 * t for t in range(384)),
}
WORDS_SM90_MORE = 5 * 96 + 3 * 32 + 2 * 1400 + (1504 + 704) * 64 + 128 + 2 * 1024 + 384
WORDS_SM90 = 18 * 64 + (64 + 64 + 128 + 192 + 8) * 64 + 256 + 2 * (2 * 18 * 32 + 128) + 1400


def check(words, parts):
    at = 0
    for name, part in parts.items():
        want = list(part())
        got = words[at : at + len(want)]
        wrong = [f"word {i}: {g:08x}, not {w:08x}" for i, (g, w) in enumerate(zip(got, want)) if g != w]
        assert not wrong and len(got) == len(want), f"{name}: {len(wrong)} words differ, {wrong[:8]}"
        at += len(want)
    assert at == len(words)


@pytest.mark.needs_emulator
@pytest.mark.parametrize("seed", range(3))
def test_emulator(seed):
    library = emulator.build(
        "tests/emulator/conformance.cu",
        exports={"run": "vtok::cuda::conformance"},
        glue="namespace vtok::cuda { Status conformance(const Tensor&); }",
    )
    words = torch.full((WORDS,), -1, dtype=torch.int32)
    words[COPIED : COPIED + 32] = torch.arange(1, 33)
    words[COPIED + 32 : COPIED + 64] = 0x3F000000
    library.run(words, seed=seed)
    check([n & 0xFFFFFFFF for n in words.tolist()], PARTS)


@pytest.mark.needs_emulator
@pytest.mark.parametrize("seed", range(3))
def test_emulator_sm90(seed):
    library = emulator.build(
        "tests/emulator/conformance_sm90.cu",
        exports={"run": "vtok::cuda::conformance_sm90"},
        glue="namespace vtok::cuda { Status conformance_sm90(const Tensor&, const Tensor&); }",
    )
    elements = torch.arange(1, 80 * 7 * 5 + 1, dtype=torch.int16).view(torch.float16)
    words = torch.full((WORDS_SM90,), -1, dtype=torch.int32)
    library.run(elements, words, seed=seed, capability=90)
    check([n & 0xFFFFFFFF for n in words.tolist()], PARTS_SM90)


@pytest.mark.needs_emulator
@pytest.mark.parametrize("seed", range(3))
def test_emulator_sm90_more(seed):
    library = emulator.build(
        "tests/emulator/conformance_sm90_more.cu",
        exports={"run": "vtok::cuda::conformance_sm90_more"},
        glue="namespace vtok::cuda { Status conformance_sm90_more(const Tensor&, const Tensor&); }",
    )
    elements = torch.arange(1, FIVE.size + 1, dtype=torch.int16).view(torch.float16)
    words = torch.full((WORDS_SM90_MORE,), -1, dtype=torch.int32)
    library.run(elements, words, seed=seed, capability=90)
    check([n & 0xFFFFFFFF for n in words.tolist()], PARTS_SM90_MORE)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or shutil.which("nvcc") is None, reason="needs a GPU and nvcc"
)
@pytest.mark.parametrize(
    "name, parts",
    (
        ("conformance", PARTS),
        ("conformance_sm90", PARTS_SM90),
        ("conformance_sm90_more", PARTS_SM90_MORE),
    ),
)
def test_gpu(tmp_path, name, parts):
    capability = torch.cuda.get_device_capability()
    if parts is not PARTS and capability != (9, 0):
        pytest.skip("needs compute capability 9.0")
    arch = "90a" if capability == (9, 0) else "".join(map(str, capability))
    program = tmp_path / name
    subprocess.run(
        [
            "nvcc",
            "-std=c++17",
            f"-gencode=arch=compute_{arch},code=sm_{arch}",
            "-I",
            HERE.parents[1] / "csrc",
            HERE / f"{name}.cu",
            "-o",
            program,
        ],
        check=True,
    )
    check(
        [
            int(line, 16)
            for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        ],
        parts,
    )
