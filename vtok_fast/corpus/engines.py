"""Where clips are worked on: in processes of this machine, or as actors that Ray schedules over a cluster.

An engine takes clips by `submit` and gives back their lines for the manifest by `next`, in whatever order
they end: it waits for one, and gives all that are there, which then share a commit. Each of its workers keeps
one child process (`vtok_fast.corpus.child`); a clip that ends that is answered by a line "crashed", and the
next clip gets a new one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import Any

from vtok_fast.corpus.manifest import Row

STARTS = 2  # of a process that is lost while it loads the model: somebody may have killed it
LOST = 5  # times that a clip is given out again after its actor or its machine was lost


class Supervisor:
    """One child process, and another one after each that was lost."""

    def __init__(self, job: dict[str, Any]):
        self.job = job
        self._child: subprocess.Popen[str] | None = None
        self._facts: Row = {}
        self._closed = False

    def facts(self) -> Row:
        """What the model is. Raises RuntimeError if the child cannot load it."""
        self._start()
        return self._facts

    def run(self, task: Row) -> Row:
        """The line for the manifest. Raises RuntimeError where the machine is at fault."""
        self._start()
        answer = self._ask(task)
        if answer is None:
            how = self._ended()
            row = {key: task[key] for key in ("clip", "input", "member") if key in task}
            return row | {"status": "crashed", "reason": how, "attempt": task.get("attempt", 0) + 1}
        if "fatal" in answer:
            raise RuntimeError(f"{task['clip']}: {answer['fatal']}")
        return answer

    def close(self) -> None:
        self._closed = True
        if self._child is not None and self._child.poll() is None:
            self._child.kill()
            self._child.wait()

    def _start(self) -> None:
        if self._closed:
            raise RuntimeError("the engine was closed")
        if self._child is not None and self._child.poll() is None:
            return
        threads = {"OMP_NUM_THREADS": str(self.job["threads"])} if self.job.get("threads") else {}
        env = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        for _ in range(STARTS):
            self._child = subprocess.Popen(
                [sys.executable, "-m", "vtok_fast.corpus.child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=env,
            )
            if (facts := self._ask(self.job)) is not None:
                break
        else:
            raise RuntimeError(f"the process that loads {self.job['model']} {self._ended()}")
        if "fatal" in facts:
            raise RuntimeError(facts["fatal"])
        if self._facts and facts["weights"] != self._facts["weights"]:
            raise RuntimeError(f"checkpoint: {self.job.get('checkpoint')} changed while the corpus was made")
        self._facts = facts

    def _ask(self, question: Row) -> Row | None:
        """The child's answer; None if it ends instead."""
        assert self._child is not None and self._child.stdin and self._child.stdout
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            return None
        line = self._child.stdout.readline()
        return json.loads(line) if line.endswith("\n") else None

    def _ended(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        if code >= 0:
            return f"ended its process with code {code}"
        try:
            return f"ended its process by {signal.Signals(-code).name}"
        except ValueError:
            return f"ended its process by signal {-code}"


class Local:
    """`workers` child processes of this machine."""

    def __init__(self, job: dict[str, Any], workers: int):
        self.workers = workers
        self._supervisors = [Supervisor(job) for _ in range(workers)]
        self._tasks: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._rows: queue.SimpleQueue[Row | BaseException] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def facts(self) -> Row:
        return self._supervisors[0].facts()

    def submit(self, task: Row) -> None:
        if not self._threads:
            self._threads = [
                threading.Thread(target=self._work, args=(one,), daemon=True) for one in self._supervisors
            ]
            for thread in self._threads:
                thread.start()
        self._tasks.put(task)

    def next(self) -> list[Row]:
        found = [self._rows.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._rows.get_nowait())
        for row in found:
            if isinstance(row, BaseException):
                raise row
        return [row for row in found if isinstance(row, dict)]

    def _work(self, supervisor: Supervisor) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                self._rows.put(supervisor.run(task))
            except BaseException as error:
                self._rows.put(error)

    def close(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)
        for supervisor in self._supervisors:
            supervisor.close()


class OnRay:
    """Actors that Ray schedules, one for each GPU, or for each `cores` cores where there are no GPUs. In
    the place of an actor that was lost Ray starts another one, elsewhere if need be: not the same one again,
    which would refuse what it is asked while it starts.

    Args:
        workers: how many actors. None: as many as the cluster has room for.
        address: of the cluster, as for `ray.init`. None: one that is running on this machine, or a new one.
    """

    def __init__(self, job: dict[str, Any], workers: int | None, cores: int, address: str | None):
        try:
            import ray
        except ImportError as error:
            raise ImportError(f'engine=ray needs Ray ({error}): pip install "vtok-fast[ray]"') from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
            self._ray.init(address=address, include_dashboard=None if address else False, **quiet)
        there = ray.cluster_resources()
        wants_gpu = str(job.get("device") or ("cuda" if there.get("GPU") else "cpu")).startswith("cuda")
        cores = min(cores, max(1, int(there.get("CPU", 1))))
        room = there.get("GPU", 0) if wants_gpu else there.get("CPU", 1) // cores
        self.workers = workers or max(1, int(room))
        needs: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if wants_gpu else {"num_cpus": cores}
        job = {**job, "device": "cuda"} if wants_gpu else {**job, "device": "cpu", "threads": cores}
        kind = self._ray.remote(max_restarts=0, max_task_retries=0, **needs)(Supervisor)
        self._actor = lambda: kind.remote(job)
        self._idle: deque[Any] = deque(self._actor() for _ in range(self.workers))
        self._actors = list(self._idle)
        self._waiting: deque[Row] = deque()
        self._running: dict[Any, tuple[Any, Row]] = {}

    def facts(self) -> Row:
        """Of the first actor; Ray waits for room where there is none."""
        for attempt in range(LOST):
            try:
                return self._ray.get(self._actors[0].facts.remote())
            except self._ray.exceptions.RayTaskError as error:
                raise RuntimeError(str(error.cause)) from error
            except self._ray.exceptions.RayActorError:
                if attempt == LOST - 1:
                    raise
                self._idle[0] = self._replaced(self._idle[0])
        raise AssertionError

    def submit(self, task: Row) -> None:
        self._waiting.append(task)
        self._give_out()

    def _give_out(self) -> None:
        while self._waiting and self._idle:
            actor, task = self._idle.popleft(), self._waiting.popleft()
            self._running[actor.run.remote(task)] = actor, task

    def next(self) -> list[Row]:
        rows: list[Row] = []
        while not rows:
            self._ray.wait(list(self._running), num_returns=1)
            ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
            rows = [row for one in ready if (row := self._row(one)) is not None]
            self._give_out()
        return rows

    def _row(self, ready: Any) -> Row | None:
        """The line of a task that ended; None if its actor was lost, and it is given out again."""
        actor, task = self._running.pop(ready)
        try:
            row = self._ray.get(ready)
            self._idle.append(actor)
            return row
        except self._ray.exceptions.RayTaskError as error:
            raise RuntimeError(str(error.cause)) from error
        except self._ray.exceptions.RayActorError as error:  # the process or its machine, not the clip
            lost = task.get("lost", 0) + 1
            if lost > LOST:
                raise RuntimeError(f"{task['clip']}: its actor was lost {lost} times: {error}") from error
            self._waiting.appendleft({**task, "lost": lost})
            self._idle.append(self._replaced(actor))
            return None

    def _replaced(self, actor: Any) -> Any:
        self._ray.kill(actor)  # it may only be out of reach
        new = self._actor()
        self._actors[self._actors.index(actor)] = new
        return new

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()
