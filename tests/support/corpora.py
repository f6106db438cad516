"""Corpora of tokens for tests, without a model: random indices in the files that the tokenizers write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from vtok_fast.corpus.manifest import NAME, WORK, read_manifest, writing
from vtok_fast.corpus.shard import write_shard
from vtok_fast.io.files import digest_of
from vtok_fast.io.token_windows import write_windows
from vtok_fast.io.tokens import Tokens

WEIGHTS = "00ff" * 16


def tokens_file(
    path: Path, codes: int, grids: list[tuple[int, int, int]], dropped: bool = False, **changes: Any
) -> Path:
    """A file of windows of random indices, as `vtok-fast tokenize` leaves it."""
    parts = []
    path.parent.mkdir(parents=True, exist_ok=True)
    for number, (t, h, w) in enumerate(grids):
        indices = torch.randint(codes, (1, t, h, w), dtype=torch.int32)
        if dropped:
            indices[0, 0, 0, : w // 2] = -1
        parts.append(path.with_name(f"{path.name}.{number}"))
        model = {"model": "vidtok/some", "config": {"codes": codes}, **changes}
        Tokens(video_shape=(4 * t - 3, 8 * h, 8 * w), dtype=torch.float32, indices=indices, **model).save(
            parts[-1]
        )
    frames = sum(4 * t - 3 for t, _, _ in grids)
    times = {"base": [1, 25], "start": 0, "steps": [[1, frames]]}
    write_windows(path, parts, {"frames": frames, "fps": 25.0, "times": times, "weights": WEIGHTS})
    for part in parts:
        part.unlink()
    return path


def settings(codes: int = 32768, **changes: Any) -> dict[str, Any]:
    return {"model": "vidtok/some", "weights": WEIGHTS, "codes": codes, **changes}


def corpus(
    folder: Path,
    clips: int,
    codes: int = 32768,
    shard: int | None = None,
    grids: tuple[tuple[int, int, int], ...] = ((2, 3, 4), (1, 3, 4)),
    prefix: str = "clip",
) -> Path:
    """A folder of `clips` clips, in shards of `shard` clips each, or each in its own file."""
    names = [f"{prefix}-{number:04d}.mp4" for number in range(clips)]
    with writing(folder, settings(codes)) as manifest:
        staged = folder / WORK / "staged" if shard else folder
        for number, name in enumerate(names):
            file = tokens_file(staged / f"{name}.tokens", codes, list(grids))
            row = {"clip": name, "status": "done", "sha256": digest_of(file), "bytes": file.stat().st_size}
            manifest.append([row | ({"group": number // shard} if shard else {})])
        for first in range(0, clips, shard or clips):
            if shard:
                some = names[first : first + shard]
                path = folder / f"tokens-{first // shard:06d}.safetensors"
                whole = write_shard(path, [(name, staged / f"{name}.tokens") for name in some], codes)
                row = {"shard": path.name, "clips": some, "sha256": whole, "bytes": path.stat().st_size}
                manifest.append([row])
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    """The lines of the manifest after the first."""
    return [json.loads(line) for line in (folder / NAME).read_text().splitlines()[1:]]


def outcome(folder: Path) -> Any:
    """How every input ended and the bytes of every result, without how long it took, and by which signal."""
    contents = read_manifest(folder)
    free = ("seconds", "attempt")
    ends = [row for row in rows(folder) if "clip" in row]
    for row in ends:
        row["reason"] = re.sub("SIG[A-Z]+", "a signal", row.get("reason", ""))
    last = {row["clip"]: {k: v for k, v in row.items() if k not in free} for row in ends}
    files = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != NAME
    }
    return last, [row for row in rows(folder) if "shard" in row], files, contents.settings
