"""The driver of a corpus: gives clips to an engine, and commits what comes back."""

from __future__ import annotations

import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vtok_fast.corpus.child import task_identity
from vtok_fast.corpus.engines import Local, OnRay
from vtok_fast.corpus.inputs import Clip, find_clips
from vtok_fast.corpus.manifest import SUFFIX, WORK, Manifest, Row, writing
from vtok_fast.corpus.shard import write_shard

ATTEMPTS = 2  # of a clip that ends its process
STAGES = ("decode", "model", "write")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        total: inputs. unchanged: of those, done, failed or skipped before, and as they were then.
        done, failed, skipped: in this run.
        frames, tokens, bytes: of what this run made.
        seconds: since the first clip was given out.
        spent: seconds of all workers together in "decode", "model" and "write".
    """

    total: int
    unchanged: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    frames: int = 0
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    _start: float = field(default_factory=time.monotonic, repr=False)

    @property
    def bottleneck(self) -> str | None:
        """The stage that takes most of the workers' time; None before the first clip is done."""
        return max(STAGES, key=self.spent.__getitem__) if any(self.spent.values()) else None

    def add(self, row: Row) -> None:
        self.seconds = time.monotonic() - self._start
        if row["status"] not in ("done", "failed", "skipped"):
            return
        setattr(self, row["status"], getattr(self, row["status"]) + 1)
        if row["status"] == "done":
            self.frames += row["frames"] or 0
            self.tokens += row["tokens"]
            self.bytes += row["bytes"]
            for stage, seconds in row["seconds"].items():
                self.spent[stage] += seconds

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        names = ("total", "unchanged", "done", "failed", "skipped", "frames", "tokens", "bytes")
        rate = {f"{name}_per_second": self.per_second(name) for name in ("done", "frames", "tokens")}
        spent = {name: round(seconds, 3) for name, seconds in self.spent.items()}
        facts = {name: getattr(self, name) for name in names} | {"seconds": round(self.seconds, 3)}
        return facts | rate | {"spent": spent, "bottleneck": self.bottleneck}

    def per_second(self, name: str) -> float:
        return round(getattr(self, name) / self.seconds, 3) if self.seconds else 0.0


def make_corpus(
    inputs: Iterable[str],
    folder: str | Path,
    *,
    model: str = "vidtok/tiny",
    checkpoint: str | None = None,
    device: str | None = None,
    dtype: str = "fp32",
    accelerate: bool = True,
    engine: str = "local",
    workers: int | None = None,
    cores: int = 4,
    address: str | None = None,
    shards: int | None = None,
    detokenize: bool = False,
    any_weights: bool = False,
    retry_failed: bool = False,
    column: str | None = None,
    progress: Callable[[Progress], None] = lambda progress: None,
    **options: Any,
) -> Progress:
    """Tokenize all inputs into a folder, or what of them is missing there or has changed.

    Args:
        inputs, column: as for `vtok_fast.corpus.inputs.find_clips`.
        folder: of the corpus; with Ray, one that all machines see under this path.
        model, checkpoint, device, dtype, accelerate: as for `vtok-fast tokenize`.
        engine: "local", child processes of this machine; or "ray".
        workers: how many. None: one; with Ray, one for each GPU, or for each `cores` cores.
        cores: of each worker without a GPU, with Ray.
        address: of a Ray cluster. None: the one of this machine, or a new one.
        shards: clips of each shard. None: a file for each clip.
        detokenize: make videos of files of tokens or corpora of them.
        any_weights: with detokenize, as for `vtok-fast detokenize`.
        retry_failed: try again what failed, also if it is as it was.
        progress: called with the same object after each clip.
        options: of `vtok_fast.commands.tokenize.tokenize`: size, window, overlap, fps and so on.

    Raises FileNotFoundError for an input that matches nothing; ValueError for an impossible value, or a
    folder with another corpus; OSError if it cannot be written, or another run writes it; ImportError without
    what the engine needs; RuntimeError for a model that cannot be loaded, or a machine at fault.
    """
    for name, value in (("workers", workers), ("cores", cores), ("shards", shards)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r}: local or ray")
    if shards and detokenize:
        raise ValueError(f"shards={shards}: they hold tokens, not videos")
    clips, folder = find_clips(inputs, column=column, tokens=detokenize), Path(folder).absolute()
    options = {key: value for key, value in options.items() if value is not None}
    job = {
        "folder": str(folder),
        "model": model,
        "checkpoint": checkpoint and str(Path(checkpoint).absolute()),
        "device": device,
        "dtype": dtype,
        "accelerate": accelerate,
        "staged": shards is not None,
        "detokenize": detokenize,
        "any_weights": any_weights,
        "options": options,
    }
    crew = Local(job, workers or 1) if engine == "local" else OnRay(job, workers, cores, address)
    try:
        facts = crew.facts()
        settings: Row = {"kind": "videos" if detokenize else "tokens", "options": options}
        settings |= {"dtype": dtype, "accelerate": accelerate, "shards": shards}
        settings |= {key: facts[key] for key in ("model", "weights", "codes")}
        with writing(folder, settings) as manifest:
            return _Run(manifest, clips, shards, retry_failed, facts["codes"]).drive(crew, progress)
    finally:
        crew.close()


class _Run:
    """What is to be done, and in which shards it goes: number i takes the next `shards` clips, in the order
    of their names, that no earlier shard has, whether they end well or not. So the same inputs give the same
    shards, however often the run was ended and begun again."""

    def __init__(
        self, manifest: Manifest, clips: list[Clip], shards: int | None, retry: bool, codes: int | None
    ):
        self.manifest, self.folder, self.shards, self.codes = manifest, manifest.folder, shards, codes
        self.progress = Progress(len(clips))
        self.tasks: dict[str, Row] = {}
        self._sizes: dict[str, int | None] = {}
        first: dict[tuple[str, str | None], str] = {}
        known = manifest.contents.clips
        for clip in clips:
            task = {"clip": clip.name, "input": clip.address, "member": clip.member}
            same = first.setdefault((clip.address, clip.member), clip.name)
            row = known.get(clip.name)
            if same != clip.name:
                reason = f"the same file as {same}"
                if row is None or row.get("reason") != reason:
                    skipped = {"clip": clip.name, "input": clip.address, "status": "skipped"}
                    manifest.append([{**skipped, "reason": reason}])
                    self.progress.skipped += 1
                else:
                    self.progress.unchanged += 1
            elif row is not None and self._is_settled(row, task, retry):
                self.progress.unchanged += 1
            else:
                attempt = row["attempt"] if row is not None and row["status"] == "crashed" else 0
                self.tasks[clip.name] = {**task, "attempt": attempt}
        self._group()

    def _is_settled(self, row: Row, task: Row, retry: bool) -> bool:
        """Whether a clip is as it was when its line was written, and so are its tokens."""
        if row["status"] in ("crashed", "skipped") or retry and row["status"] == "failed":
            return False
        try:
            now = task_identity(task)
        except OSError:
            now = None
        if now != row["identity"] or row["input"] != task["input"]:
            return False
        if row["status"] == "failed":
            return True
        expected = self.manifest.contents.shards[row["shard"]] if "shard" in row else row
        path = self.manifest.contents.file_of(self.folder, row["clip"])
        if str(path) not in self._sizes:
            self._sizes[str(path)] = path.stat().st_size if path.is_file() else None
        return self._sizes[str(path)] == expected["bytes"]

    def _group(self) -> None:
        self.groups: deque[list[str]] = deque()
        self.group_of: dict[str, int] = {}
        self._open: Counter[int | None] = Counter()  # clips that are not settled, of each shard to be
        if self.shards is None:
            return
        committed = len(self.manifest.contents.shards)
        rows = self.manifest.contents.clips
        names = []
        for name in sorted({*rows, *self.tasks}):
            row = rows.get(name, {})
            waits = "shard" not in row and row.get("group", -1) >= committed
            if name in self.tasks or (row.get("status") in ("done", "failed") and waits):
                names.append(name)
            elif "shard" in row:  # committed, and perhaps killed before this
                self._staged(name).unlink(missing_ok=True)
        for start in range(0, len(names), self.shards):
            group = names[start : start + self.shards]
            self.group_of |= dict.fromkeys(group, committed + len(self.groups))
            self.groups.append(group)
        self._open.update(self.group_of[name] for name in self.tasks)

    def _staged(self, name: str) -> Path:
        return self.folder / WORK / "staged" / f"{name}{SUFFIX}"

    def drive(self, crew: Local | OnRay, report: Callable[[Progress], None]) -> Progress:
        waiting: deque[str] = deque(self.tasks)
        running: set[str] = set()
        self._commit_shards()
        self.progress._start = time.monotonic()
        while waiting or running:
            while waiting and len(running) < crew.workers + 2:  # so that no worker waits for this loop
                running.add(name := waiting.popleft())
                crew.submit(self.tasks[name])
            rows = []
            for row in crew.next():
                running.remove(name := row["clip"])
                rows.append(row)
                if row["status"] == "crashed":
                    if row["attempt"] < ATTEMPTS:
                        self.tasks[name]["attempt"] = row["attempt"]
                        waiting.appendleft(name)
                        continue
                    rows[-1] = row = self._given_up(row)
                if name in self.group_of:
                    row["group"] = self.group_of[name]
                del self.tasks[name]
                self._open[row.get("group")] -= 1
            self.manifest.append(rows)
            for row in rows:
                self.progress.add(row)
            self._commit_shards()
            report(self.progress)
        shutil.rmtree(self.folder / WORK, ignore_errors=True)  # every clip is settled: nothing needs it
        report(self.progress)
        return self.progress

    def _given_up(self, row: Row) -> Row:
        """A clip that ended its process as often as it may: where is known by the windows that were done."""
        try:
            identity = task_identity(self.tasks[row["clip"]])
        except OSError:
            identity = None
        parts = self.folder / WORK / "making" / f"{row['clip']}{SUFFIX}.parts"
        done = sorted(parts.glob("*.safetensors"))
        frame = None
        if done:
            from vtok_fast.io.token_windows import part_info
            from vtok_fast.io.video.timing import Times

            frame = sum(len(Times.from_json(part_info(part)["times"])) for part in done)
        reason = f"{row['reason']}, {row['attempt']} times"
        return {
            **row,
            "status": "failed",
            "identity": identity,
            "reason": reason,
            "frame": frame,
            "time": None,
        }

    def _commit_shards(self) -> None:
        """Write the shards of which all clips are settled, in order."""
        while self.groups and not self._open[number := len(self.manifest.contents.shards)]:
            start = time.monotonic()
            group, rows = self.groups.popleft(), self.manifest.contents.clips
            names = [name for name in group if rows[name]["status"] == "done"]
            row: Row = {"shard": f"tokens-{number:06d}.safetensors", "clips": names, "bytes": 0}
            if names:
                path = self.folder / row["shard"]
                row["sha256"] = write_shard(path, [(name, self._staged(name)) for name in names], self.codes)
                row["bytes"] = path.stat().st_size
            self.manifest.append([row])
            for name in names:
                self._staged(name).unlink()
            self.progress.spent["write"] += time.monotonic() - start
