"""`--engine ray` on two cores: the same corpus as one process makes, whatever is killed. One Ray for all."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("av")
ray = pytest.importorskip("ray", reason="Ray is not installed (the extra [ray])")

from support.clips import make_folder, poisoned, workers_of  # noqa: E402
from support.corpora import outcome  # noqa: E402

from vtok_fast.corpus.drive import make_corpus  # noqa: E402
from vtok_fast.corpus.manifest import NAME  # noqa: E402

pytestmark = [pytest.mark.volatile, pytest.mark.slow]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("videos") / "videos", 5, 6)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Ray on two cores, of which the processes that work on clips meet poison. The memory of other programs
    does not count."""
    hook = poisoned(tmp_path_factory.mktemp("hook") / "hook")
    changed = {
        "PYTHONPATH": hook["PYTHONPATH"],
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_AUTH_MODE": "disabled",
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ |= changed
    sys.path.append(hook["PYTHONPATH"])  # what a child of this process is given
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield hook["PYTHONPATH"]
    ray.shutdown()
    sys.path.remove(hook["PYTHONPATH"])
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def is_ours(pid, hook):
    """Whether a process that works on clips belongs to this cluster: it has its hook."""
    try:
        return hook.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # it has just ended
        return False


def test_the_same_corpus_as_one_process_makes(videos, cluster, tmp_path):
    """Its workers are killed meanwhile, and an actor: what was in flight is done again."""
    options = {"shards": 4, "window": 5}
    make_corpus([str(videos)], tmp_path / "local", **options)
    hurt: list[int] = []

    def hurt_actor() -> None:
        while not (tmp_path / "ray" / NAME).is_file():
            time.sleep(0.01)
        while not (found := [pid for pid in workers_of(None) if is_ours(pid, cluster)]):
            time.sleep(0.01)
        with open(f"/proc/{found[0]}/stat") as file:
            actor = int(file.read().rpartition(")")[2].split()[1])
        os.kill(actor, signal.SIGKILL)
        hurt.append(actor)

    thread = threading.Thread(target=hurt_actor)
    thread.start()
    progress = make_corpus([str(videos)], tmp_path / "ray", engine="ray", workers=1, cores=1, **options)
    thread.join()
    assert hurt and (progress.done, progress.failed) == (5, 6)
    assert outcome(tmp_path / "ray") == outcome(tmp_path / "local")
    again = make_corpus([str(videos)], tmp_path / "ray", engine="ray", workers=2, cores=1, **options)
    assert again.unchanged == 11 and outcome(tmp_path / "ray") == outcome(tmp_path / "local")


def test_a_model_that_cannot_be_loaded_is_said(videos, cluster, tmp_path):
    with pytest.raises(RuntimeError, match="vidtok/nothing"):
        make_corpus([str(videos)], tmp_path / "out", engine="ray", workers=1, cores=1, model="vidtok/nothing")
    assert not (tmp_path / "out").exists()
