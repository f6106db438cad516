"""Files that are there whole after a loss of power too: temporary file, fsync, rename, fsync of the
folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from vtok_fast.io.files import write_atomically


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_durably(path: Path, write: Callable[[str], None]) -> None:
    """`write_atomically`, and on the disk when this returns. Raises OSError if it cannot be written."""

    def synced(temporary: str) -> None:
        write(temporary)
        sync(temporary)

    write_atomically(path, synced)
    sync(path.parent)


def move_durably(source: Path, target: Path) -> None:
    """Commit a finished file under its name: on the disk first, then renamed."""
    sync(source)
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(source, target)
    for folder in {target.parent, *(folder.parent for folder in made)}:
        sync(folder)
