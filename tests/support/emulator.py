"""Runs the CUDA sources on the CPU, and finds what a GPU would not tell: see `build`.

    from support.emulator import build, EmulatorError

    conv = build("csrc/cuda/causal_conv3d/sm80_forward.cu", ..., includes=["cuda/causal_conv3d/call.h"],
                 exports={"forward": "vtok::cuda::causal_conv3d_sm80_call"})
    for seed in (0, 1, 2):
        conv.forward(x, weight, None, out, [1, 1, 1], 0, None, seed=seed)      # fills `out`, a CPU tensor

The function named on the right is an ordinary launcher, ``Status (*)(parameters...)``. Arguments become its
parameters by position: a torch tensor or what ``vtok_fast.dispatch.native.arg`` makes of it (None where
absent) a ``vtok::Tensor``; an int or bool any integer, bool or enum; a float any floating point; a list of
numbers ``std::vector`` or ``std::array``; None an empty ``std::optional`` or the stream. Where a launcher
takes a struct, wrap it: ``exports={"forward": "+[](vtok::Tensor x) { Problem p; ...; return launch(p); }"}``;
``glue`` is C++ text put before the exports.

Every tensor argument is registered as global memory, from its first to its last element; what else the
kernels touch must be named in ``also=[...]``. Outputs are best filled with NaN before the call. A launcher's
Status becomes ValueError, NotImplementedError, MemoryError or, with what the emulator found in a kernel,
EmulatorError. Found are: accesses out of bounds or misaligned, in shared and global memory; reads of shared
memory never written; races in shared memory; bytes of global memory that two threads write, or one writes and
another reads, without a barrier between; barriers and warp instructions that not all reach or that differ
among threads; deadlocks; launches that no GPU takes.

``seed`` decides the order of blocks and threads and when asynchronous copies land: 0 at once, 1 as late as
allowed, 2 and up at random. ``capability=90`` allows the instructions of ptx_sm90.cuh; ``shared_limit``
(bytes a block may have; 99 KiB, as on the smallest GPUs) and ``multiprocessors`` are what a launcher is told
of the device. After a call ``conv.launched`` is the last launch as the source has it, kernel and arguments,
and ``conv.bank_conflicts`` what ldmatrix would have lost in it.

Host code meets the runtime and the driver of tests/emulator/runtime.h: a thread has no context until it binds
one, a kernel no more shared memory than it was granted. ``conv.refusing()`` is a driver that says no.

The environment variable VTOK_EMULATOR_FLAGS adds compiler flags. So AddressSanitizer watches kernels and
emulator: ``LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0 VTOK_EMULATOR_FLAGS="-fsanitize=address -g" pytest ...``

Compiled code is kept in tests/emulator/.cache for two weeks, by a hash of all sources and flags. Processes
that want the same file wait for the one that compiles it. What is compiled while a source is edited is not
kept: it may be of other text than was hashed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parents[1] / "emulator"
ROOT = HERE.parents[1]
CACHE = HERE / ".cache"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-DVTOK_EMULATOR",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    f"-I{ROOT / 'csrc'}",
    f"-I{HERE}",
    *os.environ.get("VTOK_EMULATOR_FLAGS", "").split(),
)
ITEM_SIZES = (4, 2, 2, 8, 4, 8, 1)  # by DType of csrc/tensor.h, as is:
DTYPES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
}
ERRORS = {1: ValueError, 2: NotImplementedError, 3: MemoryError}


class EmulatorError(RuntimeError):
    """What the emulator found wrong with a kernel."""


class SourcesChanged(RuntimeError):
    """A source was edited while it was compiled."""


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("rank", ctypes.c_int),
        ("size", ctypes.c_int64 * 6),
        ("stride", ctypes.c_int64 * 6),
    ]


class _Arg(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("integers", ctypes.POINTER(ctypes.c_int64)),
        ("reals", ctypes.POINTER(ctypes.c_double)),
        ("count", ctypes.c_int64),
        ("integer", ctypes.c_int64),
        ("real", ctypes.c_double),
        ("present", ctypes.c_int),
    ]


def why_missing() -> str | None:
    """Why the emulator cannot run here, or None."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the emulator switches between threads on x86-64 only, this is {platform.machine()}"
    return None if _compiler() else "the emulator needs a C++ compiler (g++)"


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "")) or shutil.which("g++")


def build(
    *sources: str | Path,
    exports: Mapping[str, str],
    includes: Sequence[str] = (),
    glue: str = "",
    flags: Sequence[str] = (),
) -> Library:
    """Compiles sources (from the repository's root) with the emulator; ``exports`` become methods of the
    result. SourcesChanged where they are edited again and again meanwhile."""
    for _ in range(2):
        with contextlib.suppress(SourcesChanged):
            return Library(_built(sources, exports, includes, glue, flags), exports)
    return Library(_built(sources, exports, includes, glue, flags), exports)


def _built(
    sources: Sequence[str | Path],
    exports: Mapping[str, str],
    includes: Sequence[str],
    glue: str,
    flags: Sequence[str],
) -> Path:
    text = "".join(f'#include "{name}"\n' for name in (*includes, "calls.h")) + glue + "\n"
    text += "".join(f"EMU_EXPORT({name}, {function})\n" for name, function in exports.items())
    parts = [*(ROOT / source for source in sources), *sorted(HERE.glob("*.cpp"))]
    headers = sorted(p for folder in (ROOT / "csrc", HERE) for p in folder.rglob("*.*h") if p.is_file())
    read = {path: path.read_bytes() for path in (*headers, *parts)}
    seen = hashlib.sha256(
        repr((FLAGS, tuple(flags), _compiler())).encode() + b"".join(read[p] for p in headers)
    )

    def check() -> None:
        for path, content in read.items():
            if not path.exists() or path.read_bytes() != content:
                raise SourcesChanged(f"{path} was edited while it was compiled")

    def compiled(name: str, content: bytes, source: Path) -> tuple[Path, tuple[Any, ...]]:
        digest = seen.copy()
        digest.update(content)
        command = (_compiler(), *FLAGS, *flags, "-x", "c++", "-c", source)
        return CACHE / f"{name}.{digest.hexdigest()[:16]}.o", command

    CACHE.mkdir(exist_ok=True)
    made = dict(compiled(part.stem, read[part], part) for part in parts)
    written = CACHE / f"exports.{hashlib.sha256(text.encode()).hexdigest()[:16]}.cpp"
    temporary = written.with_suffix(f".{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, written)
    made |= [compiled("exports", text.encode(), written)]
    _make(made, check)
    target = CACHE / f"lib.{hashlib.sha256(repr([*made]).encode()).hexdigest()[:16]}.so"
    _make({target: (_compiler(), "-shared", *flags, *FLAGS, *made)})
    return target


def _make(commands: Mapping[Path, Sequence[Any]], check: Callable[[], None] = lambda: None) -> None:
    """Runs the command of every file that is missing, and keeps its result unless `check` raises. What
    another process is at comes last: processes that want the same files share the work."""
    for wait in (fcntl.LOCK_NB, 0):
        for target, command in commands.items():
            if target.exists():
                continue
            with open(target.with_suffix(".lock"), "w") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | wait)
                if not target.exists():
                    _run(*command, target=target, check=check)
    for target in commands:
        os.utime(target)
    for old in CACHE.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it
            if old.stat().st_mtime < time.time() - 14 * 86400:
                old.unlink()


def _run(*command: Any, target: Path, check: Callable[[], None]) -> None:
    temporary = target.with_suffix(f".{os.getpid()}")
    result = subprocess.run([*map(str, command), "-o", str(temporary)], capture_output=True, text=True)
    try:
        check()  # before an error, too: it may be of half an edit
    except SourcesChanged:
        temporary.unlink(missing_ok=True)
        raise
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}:\n{result.stderr[-8000:]}")
    if "warning:" in result.stderr:
        print(result.stderr)
    os.replace(temporary, target)


class Library:
    """Compiled launchers. Kernels of several threads run one after another; `multiprocessors` and the like
    hold for all threads."""

    def __init__(self, path: Path, names: Sequence[str] | Mapping[str, str]):
        self._lib = ctypes.CDLL(str(path))
        self._lib.emu_register.argtypes = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_char_p
        self._lib.emu_bank_conflicts.restype = ctypes.c_uint64
        self._lib.emu_matrices_read.restype = ctypes.c_uint64
        self._lib.emu_launched.restype = ctypes.c_char_p
        self._lib.emu_host_counts.restype = ctypes.POINTER(ctypes.c_int64)
        for name in names:
            setattr(self, name, lambda *args, name=name, **options: self._call(name, args, **options))

    @property
    def bank_conflicts(self) -> int:
        """Cycles that ldmatrix would have lost to bank conflicts in the last launch."""
        return self._lib.emu_bank_conflicts()

    @property
    def matrices_read(self) -> int:
        """By ldmatrix in the last launch: a cycle of shared memory each, and one more for a conflict."""
        return self._lib.emu_matrices_read()

    @property
    def last_device(self) -> int:
        """The device of the last launch; there are two, alike."""
        return self._lib.emu_last_device()

    @property
    def host_counts(self) -> dict[str, int]:
        """What the launchers asked of the runtime and the driver since the library was loaded."""
        names = ("launches", "attributes", "look_ups", "encodes", "occupancies")
        return dict(zip(names, self._lib.emu_host_counts()[: len(names)]))

    @contextlib.contextmanager
    def refusing(self, rank: int = 0, occupancy: bool = False) -> Iterator[None]:
        """The driver refuses tensor maps of this rank, and the occupancy query."""
        self._lib.emu_refuse(rank, occupancy)
        try:
            yield
        finally:
            self._lib.emu_refuse(0, 0)

    @property
    def launched(self) -> str:
        """The arguments of the last VTOK_LAUNCH, as its source has them."""
        return self._lib.emu_launched().decode()

    def _call(
        self,
        name: str,
        args: Sequence[Any],
        *,
        seed: int = 0,
        also: Sequence[torch.Tensor] = (),
        shared_limit: int = 99 << 10,
        multiprocessors: int = 4,
        capability: int = 80,
    ) -> None:
        self._lib.emu_prepare(seed, shared_limit, multiprocessors, capability)
        args = [_taken_apart(value) for value in args]
        for i, value in enumerate((*args, *map(_taken_apart, also))):
            if isinstance(value, _Tensor) and 0 not in value.size[: value.rank]:
                last = sum((n - 1) * s for n, s in zip(value.size, value.stride[: value.rank]))
                self._lib.emu_register(
                    value.data, (last + 1) * ITEM_SIZES[value.dtype], f"argument {i}".encode()
                )
        items = [_pack(i, value) for i, value in enumerate(args)]  # which own their lists
        packed = (_Arg * len(args))(*items)
        message = ctypes.create_string_buffer(4096)
        code = getattr(self._lib, f"emu_call_{name}")(
            packed, len(args), message, ctypes.c_size_t(len(message))
        )
        if code:
            raise ERRORS.get(code, EmulatorError)(message.value.decode())


def _taken_apart(value: Any) -> Any:
    """A tensor, or what vtok_fast.dispatch.native.arg made of one, as the C++ side takes it; other values as
    they are."""
    if isinstance(value, torch.Tensor):
        if not value.is_cpu:
            raise ValueError(f"expected a CPU tensor, got one on {value.device}")
        return _Tensor(
            value.data_ptr(), DTYPES[value.dtype], value.dim(), tuple(value.shape), tuple(value.stride())
        )
    if isinstance(value, tuple) and len(value) == 4 and isinstance(value[2], torch.Size):
        return _Tensor(value[0], value[1], len(value[2]), tuple(value[2]), tuple(value[3]))
    return value


def _pack(i: int, value: Any) -> _Arg:
    arg = _Arg(present=value is not None)
    if isinstance(value, _Tensor):
        arg.tensor = value
    elif isinstance(value, (list, tuple)):  # of numbers, or of lists of them
        value = [n for item in value for n in (item if isinstance(item, (list, tuple)) else (item,))]
        arg.count = len(value)
        arg.integers, arg.reals = (
            (ctypes.c_int64 * len(value))(*map(int, value)),
            (ctypes.c_double * len(value))(*value),
        )
    elif isinstance(value, (int, float)):
        arg.real = value
        arg.integer = int(value) if isinstance(value, int) else 0
    elif value is not None:
        raise TypeError(f"argument {i}: a tensor, number, list of numbers or None, got {value!r}")
    return arg
