"""Folders of small videos of ten kinds, with bad ones among them, and a hook that makes clips end the process
that works on them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from support.video_files import encode, moving

KINDS = ("mp4", "mkv", "mov", "avi", "webm", "mpeg4", "mjpeg", "ffv1", "vfr", "gray")
BAD = ("junk", "empty", "cut", "text", "sound", "poison")
SIZE = 32

# Runs in every Python process that has its folder on PYTHONPATH; only the one that works on clips is meant.
POISON = """
import os, signal, sys
if "vtok_fast.corpus.child" in sys.orig_argv:
    def audit(event, arguments):
        if event == "os.mkdir" and "poison" in os.path.basename(str(arguments[0])):
            os.kill(os.getpid(), signal.SIGSEGV)
    sys.addaudithook(audit)
"""


def make_clip(path: Path, kind: str, frames: int = 17, size: int = SIZE) -> Path:
    """A sound clip. `path` has no suffix."""
    pictures: list[np.ndarray] = moving(frames, size, size)
    codec, suffix, form = {
        "mkv": ("libx264", "mkv", "yuv420p"),
        "mov": ("libx264", "mov", "yuv444p"),
        "avi": ("mpeg4", "avi", "yuv420p"),
        "webm": ("libvpx", "webm", "yuv420p"),
        "mpeg4": ("mpeg4", "mp4", "yuv420p"),
        "mjpeg": ("mjpeg", "mkv", "yuvj420p"),
        "ffv1": ("ffv1", "mkv", "yuv420p"),
        "gray": ("libx264", "mp4", "gray"),
    }.get(kind, ("libx264", "mp4", "yuv420p"))
    pts = np.cumsum([40 + 40 * (t % 3) for t in range(frames)]).tolist() if kind == "vfr" else None
    return encode(path.with_name(f"{path.name}.{suffix}"), pictures, codec, form, fps=25, pts=pts)


def make_bad(path: Path, kind: str) -> Path:
    """A clip that cannot be tokenized; poison: one that could, if it did not end its process."""
    if kind == "poison":
        return make_clip(path.with_name(f"{path.name}-poison"), "mp4")
    out = path.with_name(f"{path.name}-{kind}.mp4")
    if kind == "cut":  # in the third window
        whole = make_clip(path.with_name(f"{path.name}-{kind}"), "ffv1", 51)
        data = whole.read_bytes()
        whole.write_bytes(data[: len(data) * 4 // 5])
        return whole
    out.write_bytes(
        {"junk": bytes(range(256)) * 9, "empty": b"", "text": b"no video\n" * 50}.get(kind, b"RIFF" * 9)
    )
    return out


def make_folder(folder: Path, good: int, bad: int = 0) -> Path:
    """`good` clips of all kinds in turn, in two folders, and `bad` ones."""
    for number in range(good):
        kind = KINDS[number % len(KINDS)]
        below = folder / f"part{number % 2}"
        below.mkdir(parents=True, exist_ok=True)
        make_clip(below / f"{number:04d}-{kind}", kind, 9 + number % 13)
    for number in range(bad):
        make_bad(folder / "part0" / f"{number * 7:04d}-bad", BAD[number % len(BAD)])
    return folder


def poisoned(folder: Path) -> dict[str, str]:
    """The environment in which clips with "poison" in their name end their process."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(POISON)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def workers_of(parent: int | None) -> list[int]:
    """The processes that work on clips: those whose parent this is, or all of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):  # it has just ended
            continue
        if b"vtok_fast.corpus.child" in words and parent in (None, above):
            found.append(int(folder.name))
    return found
