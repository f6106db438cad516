"""`python -m vtok_fast.corpus.child`: a process that works on one clip after another, so that a clip that
takes its process along takes nothing else.

It reads lines of JSON from standard input and answers each with a line: first the job, answered by what the
model is, then clips, each answered by its line for the manifest. It ends with its parent.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtok_fast.corpus.durable import move_durably
from vtok_fast.corpus.inputs import file_system, identity, is_remote
from vtok_fast.corpus.manifest import NAME as MANIFEST
from vtok_fast.corpus.manifest import SUFFIX, WORK, Contents, Row, read_manifest
from vtok_fast.corpus.shard import Shard
from vtok_fast.io.files import digest_of
from vtok_fast.io.token_windows import TokenWindows

FATAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE)  # the machine's, not the clip's
BUSY = 60.0  # seconds that a clip waits for a process that still holds it


class Worker:
    """Tokenizes or detokenizes clips into a corpus.

    Args:
        job: "folder", "model", "checkpoint", "config", "device", "dtype", "accelerate", "threads", "staged"
            (whether results wait for a shard), "detokenize", "any_weights", and "options" of
            `vtok_fast.commands.tokenize.tokenize`.
    """

    def __init__(self, job: dict[str, Any]):
        import torch

        from vtok_fast.commands.load_model import fingerprint, load_model
        from vtok_fast.commands.options import device_of, dtype_of

        if job.get("threads"):
            torch.set_num_threads(job["threads"])
        self.job, self.folder, self.options = job, Path(job["folder"]), job.get("options", {})
        device, dtype = device_of(job.get("device")), dtype_of(job.get("dtype") or "fp32")
        self.model: Any = load_model(job["model"], job.get("checkpoint"), job.get("config"))
        self.weights = fingerprint(self.model)
        self.model.to(device, dtype)
        if job.get("accelerate", True):
            from vtok_fast import accelerate

            accelerate(self.model)
        self.codes = getattr(self.model, "codebook_size", None)
        self.seconds = 0.0  # in the model, of this clip
        for name in ("encode", "decode"):
            setattr(self.model, name, self._timed(getattr(self.model, name), device))

    def facts(self) -> Row:
        """What the corpus is made with."""
        import torch

        name = f"{self.model.system}/{self.model.config.name}"
        where = "cuda" if next(self.model.parameters()).is_cuda else "cpu"
        return {
            "model": name,
            "weights": self.weights,
            "codes": self.codes,
            "device": where,
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }

    def _timed(self, method: Any, device: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            try:
                result = method(*args, **kwargs)
                if device.type == "cuda":  # the caller copies the result from the device at once
                    import torch

                    torch.cuda.synchronize(device)
                return result
            finally:
                self.seconds += time.monotonic() - start

        return timed

    def __call__(self, task: Row) -> Row:
        """The line for the manifest of {"clip", "input", "member"}: done or failed. Raises OSError where the
        machine is at fault, as for a full disk."""
        row: Row = {"clip": task["clip"], "input": task["input"], "status": "failed", "identity": None}
        if task.get("member") is not None:
            row["member"] = task["member"]
        done = [0]
        start = time.monotonic()
        try:
            row["identity"] = task_identity(task)
            facts = self._make(task, done)
        except OSError as error:
            if error.errno in FATAL:
                raise
            return row | self._failure(error, task, done[0])
        except Exception as error:
            return row | self._failure(error, task, done[0])
        facts["seconds"]["decode"] = round(time.monotonic() - start - sum(facts["seconds"].values()), 6)
        return row | {"status": "done", "weights": self.weights} | facts

    def _failure(self, error: Exception, task: Row, windows: int) -> Row:
        """Why, and where: the first frame of which it is not sure that it is done, and the time if the
        reason names one."""
        text = (str(error).splitlines() or [type(error).__name__])[0].replace(str(self._scratch()), "")
        window, overlap = self.model.window
        window = self.options.get("window") or window
        overlap = self.options.get("overlap") or (overlap if overlap < window else 0)
        when = re.search(r" at (\d+(?:\.\d+)?) s\b", text)
        reason = f"{type(error).__name__}: {text}"
        moment = float(when[1]) if when else None
        return {"reason": reason, "frame": windows * (window - overlap), "time": moment}

    def _scratch(self) -> Path:
        return self.folder / WORK / "fetched"

    def _make(self, task: Row, done: list[int]) -> Row:
        suffix = ".mp4" if self.job.get("detokenize") else SUFFIX
        making = self.folder / WORK / "making" / f"{task['clip']}{suffix}"
        final = self.folder / WORK / "staged" if self.job.get("staged") else self.folder
        making.parent.mkdir(parents=True, exist_ok=True)
        self.seconds = 0.0

        def progress(windows: int, total: int | None) -> None:
            done[0] = windows

        with self._local(task) as path:
            facts = self._retried(path, making, progress)
        start = time.monotonic()
        target = final / f"{task['clip']}{suffix}"
        facts |= {"bytes": making.stat().st_size, "sha256": digest_of(making), "suffix": suffix}
        move_durably(making, target)
        return facts | {
            "seconds": {"model": round(self.seconds, 6), "write": round(time.monotonic() - start, 6)}
        }

    def _retried(self, path: Path, making: Path, progress: Any) -> Row:
        """Once nobody else works on it: a process whose parent was killed goes on for a moment."""
        from vtok_fast.commands.detokenize import detokenize
        from vtok_fast.commands.tokenize import tokenize

        until = time.monotonic() + BUSY
        while True:
            try:
                if self.job.get("detokenize"):
                    detokenize(
                        path,
                        making,
                        self.model,
                        weights=self.weights,
                        any_weights=bool(self.job.get("any_weights")),
                        progress=progress,
                    )
                    return {"frames": TokenWindows(path).info.get("frames"), "tokens": 0}
                options: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in self.options.items()}
                windows = tokenize(
                    path, making, self.model, weights=self.weights, progress=progress, **options
                )
                return {
                    "frames": windows.info["frames"],
                    "windows": len(windows),
                    "size": list(windows[0].video_shape[1:]),
                    "tokens": sum(_count(tokens) for tokens in windows),
                }
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > until:
                    raise
                time.sleep(0.2)

    @contextlib.contextmanager
    def _local(self, task: Row) -> Iterator[Path]:
        """The input as a file of this machine, for as long as it is needed."""
        if task.get("member") is None and not is_remote(task["input"]):
            yield Path(task["input"])
            return
        self._scratch().mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=self._scratch(), prefix=f"{os.getpid()}-"))
        try:
            path = folder / Path(task["clip"]).name
            if task.get("member") is not None:
                contents = contents_of(task["input"])
                member = contents.clips[task["member"]]
                path = contents.file_of(Path(task["input"]), task["member"])
                if "shard" in member:
                    shard, path = Shard(path), folder / "clip.tokens"
                    shard.tokens_file(member["number"], path)
            else:
                fs, there = file_system(task["input"])
                size = fs.info(there).get("size")
                fs.get_file(there, str(path))
                if size is not None and path.stat().st_size != size:
                    raise OSError(f"{task['input']}: {path.stat().st_size} bytes of {size} came")
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def task_identity(task: Row) -> str:
    """What changes when the input does. Raises FileNotFoundError."""
    if task.get("member") is None:
        return identity(task["input"])
    return str(contents_of(task["input"]).clips[task["member"]]["sha256"])


def contents_of(folder: str) -> Contents:
    """`read_manifest`, once for each state of the file."""
    return _contents(folder, (Path(folder) / MANIFEST).stat().st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _contents(folder: str, state: int) -> Contents:
    return read_manifest(folder)


def _count(tokens: Any) -> int:
    return int((tokens.data >= 0).sum()) if tokens.latents is None else tokens.data[:, 0].numel()


def _end_with(parent: int) -> None:
    """End this process, whatever it does, once its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    _end_with(os.getppid())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints does not disturb them
    worker: Any = None
    for line in sys.stdin:
        value = json.loads(line)
        try:
            if worker is None:
                worker = Worker(value)
                answer = worker.facts()
            else:
                answer = worker(value)
        except Exception as error:
            answer = {"fatal": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
