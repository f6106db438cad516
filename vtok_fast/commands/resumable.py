"""Work that goes on after a kill: its parts lie in a folder beside the output until that is complete.

The folder is locked while a run works in it, so that two runs with one output do not disturb each other.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtok_fast.io.files import write_atomically

Progress = Callable[[int, int | None], None]  # parts done, parts in all if that is known


class Parts:
    """The folder of what is done, and what it was done for, as a context that holds its lock. Nothing in it
    is removed except what such a folder holds.

    Raises ValueError for a folder that is not one of parts; OSError if it cannot be made, or another run has
    its lock.
    """

    def __init__(self, output: Path, description: dict[str, Any]):
        self.output, self.folder = output, output.with_name(output.name + ".parts")
        self.description = json.loads(json.dumps({"program": "vtok-fast", **description}))
        self._lock: int | None = None

    def __enter__(self) -> Parts:
        try:
            self._lock = self._locked()
        except OSError as error:
            why = error.strerror or error
            raise OSError(error.errno, f"output: cannot write {self.output}: {why}") from error
        try:
            found = self._found()
            if found is None and any(
                not file.name.startswith(".job.json.") for file in self.folder.iterdir()
            ):
                raise ValueError(
                    f"output: the folder {self.folder} is not one of parts of a run; move it away, or write "
                    f"elsewhere"
                )
            if found != self.description:
                self.finish()  # of another run
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(OSError):  # parts are in it
            self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _locked(self) -> int | None:
        """The folder, made if it is not there, opened and locked. None on a system without such locks."""
        try:
            import fcntl
        except ImportError:
            self.folder.mkdir(exist_ok=True)
            return None
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:  # the run that had it has just finished
                continue
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(folder), os.stat(self.folder)):
                    return folder
            except BlockingIOError:
                os.close(folder)
                raise OSError(errno.EBUSY, f"another run is writing it (it works in {self.folder})") from None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(folder)
                raise
            os.close(folder)

    def _found(self) -> dict[str, Any] | None:
        """The description in the folder, if it is one."""
        try:
            found = json.loads((self.folder / "job.json").read_text())
        except (OSError, ValueError):
            return None
        ours = (
            isinstance(found, dict)
            and "weights" in found.get("model", found)
            and ("video" in found or "tokens" in found)
        )
        return found if ours else None

    def start(self) -> None:
        """Note what the parts are for, once there is one to put in."""
        file = self.folder / "job.json"
        if file.is_file():
            return
        try:
            write_atomically(
                file, lambda temporary: Path(temporary).write_text(json.dumps(self.description, indent=2))
            )
        except OSError as error:
            raise OSError(
                error.errno, f"output: cannot write {self.folder}: {error.strerror or error}"
            ) from error

    def part(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:06d}.{suffix}"

    def finish(self) -> None:
        """Remove the parts, then what they were for; leaving the context removes the folder if nothing else
        is in it."""
        names = r"\.?(\d{6,}\.(safetensors|mp4|json)|job\.json)(\..*\.tmp)?"
        for file in sorted(self.folder.iterdir(), key=lambda file: "job.json" in file.name):
            if re.fullmatch(names, file.name) and not file.is_dir():
                file.unlink()
