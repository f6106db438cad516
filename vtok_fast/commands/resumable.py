"""Work that goes on after a kill: its parts lie in a folder beside the output until that is complete."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

from vtok_fast.io.files import write_atomically


class Parts:
    """The folder of what is done, and what it was done for. Nothing in it is removed but what such a folder
    holds."""

    def __init__(self, output: Path, description: dict[str, Any]):
        self.folder = output.with_name(output.name + ".parts")
        self.description = json.loads(json.dumps({"program": "vtok-fast", **description}))
        if not self.folder.is_dir():
            return
        found = self._found()
        if found is None and any(not file.name.startswith(".job.json.") for file in self.folder.iterdir()):
            raise ValueError(
                f"output: the folder {self.folder} is not one of parts of a run; move it away, or write "
                f"elsewhere"
            )
        if found != self.description:
            self.finish()  # of another run

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
        """Make the folder, once there is something to put in."""
        file = self.folder / "job.json"
        if file.is_file():
            return
        try:
            self.folder.mkdir(exist_ok=True)
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
        """Remove the parts, then what they were for, then the folder if nothing else is in it."""
        names = r"\.?(\d{6,}\.(safetensors|mp4|json)|job\.json)(\..*\.tmp)?"
        for file in sorted(self.folder.iterdir(), key=lambda file: "job.json" in file.name):
            if re.fullmatch(names, file.name) and not file.is_dir():
                file.unlink()
        try:
            self.folder.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
