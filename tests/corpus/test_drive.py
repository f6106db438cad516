"""`vtok-fast corpus`: every input ends once, in one way, whatever is killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from support.clips import make_clip, make_folder, poisoned, workers_of  # noqa: E402
from support.corpora import outcome, rows  # noqa: E402

import vtok_fast  # noqa: E402
from vtok_fast.commands.load_model import PACKAGED, fingerprint  # noqa: E402
from vtok_fast.commands.tokenize import tokenize  # noqa: E402
from vtok_fast.corpus.drive import make_corpus  # noqa: E402
from vtok_fast.corpus.engines import Supervisor  # noqa: E402
from vtok_fast.corpus.manifest import NAME  # noqa: E402
from vtok_fast.io.token_windows import TokenWindows  # noqa: E402

UNREADABLE = "cannot be read as a video"
BAD = dict.fromkeys(("junk", "empty", "text", "sound"), UNREADABLE) | {
    "cut": "",
    "poison": "SIGSEGV, 2 times",
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("videos") / "videos", 6, 6)


@pytest.fixture(scope="module")
def hook(tmp_path_factory):
    return poisoned(tmp_path_factory.mktemp("hook") / "hook")


def start(videos, output, env, *options):
    command = [sys.executable, "-m", "vtok_fast.cli", "corpus", str(videos), "-o", str(output), "--json"]
    return subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(run, code=1):
    out, error = run.communicate(timeout=600)
    assert run.returncode == code, error.decode()
    return json.loads(out)


@pytest.fixture(scope="module")
def undisturbed(videos, hook, tmp_path_factory):
    """A corpus in shards of five, made in one go."""
    output = tmp_path_factory.mktemp("corpus") / "tokens"
    facts = ended(start(videos, output, hook, "--shards", "5"))
    assert (facts["total"], facts["done"], facts["failed"], facts["unchanged"]) == (12, 6, 6, 0)
    assert facts["tokens"] and facts["frames"] == sum(9 + n for n in range(6)) and facts["bottleneck"]
    return output


def test_every_input_ends_once(undisturbed, videos):
    ends = [row for row in rows(undisturbed) if row.get("status") in ("done", "failed")]
    assert sorted(row["clip"] for row in ends) == [
        f"videos/{path.relative_to(videos)}" for path in sorted(videos.rglob("*.*"))
    ]
    for kind, reason in BAD.items():
        (row,) = [row for row in ends if f"-bad-{kind}" in row["clip"]]
        assert row["status"] == "failed" and reason in row["reason"]
    (cut,) = [row for row in ends if "-bad-cut" in row["clip"]]
    assert cut["frame"] == 34  # two windows of it were done
    crashes = [row for row in rows(undisturbed) if row.get("status") == "crashed"]
    assert [row["attempt"] for row in crashes] == [1] and "poison" in crashes[0]["clip"]
    names = sorted(path.name for path in undisturbed.iterdir())
    assert names == [NAME, *(f"tokens-{n:06d}.safetensors" for n in range(3))]


def test_tokens_are_those_of_tokenize(undisturbed, videos, tmp_path):
    model = vtok_fast.models.VidTok.from_checkpoint(PACKAGED["vidtok/tiny"]).eval()
    weights = fingerprint(model)
    vtok_fast.accelerate(model)
    dataset = vtok_fast.TokenDataset(undisturbed, verify=True)
    assert len(dataset) == 6 and dataset.settings["weights"] == weights
    for clip in list(dataset)[::3]:
        own = tokenize(videos.parent / clip.name, tmp_path / "own.tokens", model, weights=weights)
        assert all(torch.equal(a, b.indices[0]) for a, b in zip(clip.windows, own, strict=True))


@pytest.mark.slow
def test_a_rerun_does_what_is_missing_or_changed(tmp_path):
    some = tmp_path / "some"
    some.mkdir()
    for number in range(4):
        make_clip(some / f"{number}", "mp4")
    output = tmp_path / "out"
    first = make_corpus([str(some)], output, window=5)
    assert (first.done, first.unchanged) == (4, 0)
    before = (output / NAME).read_bytes()
    make_clip(some / "1", "mp4", 12)  # another one under this name
    (output / "some" / "2.mp4.tokens").unlink()
    (output / "some" / "3.mp4.tokens").write_bytes(b"cut")
    link = tmp_path / "list.jsonl"
    link.write_text(json.dumps({"path": str(some / "0.mp4"), "name": "twice"}) + "\n")
    again = make_corpus([str(some), str(link)], output, window=5)
    assert (again.done, again.unchanged, again.skipped) == (3, 1, 1)
    after = (output / NAME).read_bytes()
    new = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert after.startswith(before) and [row["clip"] for row in new] == [
        "twice",
        *(f"some/{n}.mp4" for n in "123"),
    ]
    assert new[0]["status"] == "skipped" and new[0]["reason"] == "the same file as some/0.mp4"
    assert TokenWindows(output / "some" / "1.mp4.tokens").info["frames"] == 12
    with pytest.raises(ValueError, match="was made with options="):
        make_corpus([str(some)], output)
    assert (output / NAME).read_bytes() == after


@pytest.mark.slow
def test_killed_and_gone_on_with(undisturbed, videos, hook, tmp_path):
    """SIGKILL of the process that works, then of the driver: the next run gives what an undisturbed one
    gives, to the byte."""
    output = tmp_path / "out"
    run = start(videos, output, hook, "--shards", "5")
    wait_for(run, lambda: lines(output) >= 3)
    kill_worker(run)
    wait_for(run, lambda: lines(output) >= 6)
    run.kill()
    run.communicate()
    facts = ended(start(videos, output, hook, "--shards", "5"))
    assert facts["unchanged"] >= 2  # what was done before the kill is not done again
    assert outcome(output) == outcome(undisturbed)
    lines_before = (output / NAME).read_bytes()
    facts = ended(start(videos, output, hook, "--shards", "5"), 0)
    assert facts["unchanged"] == 12 and (output / NAME).read_bytes() == lines_before


def kill_worker(run):
    """That of the run: there may be none for the moment, or it may just have ended."""
    while True:
        wait_for(run, lambda: workers_of(run.pid))
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.kill(workers_of(run.pid)[0], signal.SIGKILL)
            return


def lines(folder):
    return (folder / NAME).read_bytes().count(b"\n") if (folder / NAME).is_file() else 0


def wait_for(run, condition):
    while not condition():
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)


def test_back_to_videos(undisturbed, tmp_path):
    """A corpus in shards, clip by clip; odd frame sizes aside, each has its frames and times again."""
    output = tmp_path / "videos"
    progress = make_corpus([str(undisturbed)], output, detokenize=True)
    assert (progress.done, progress.failed) == (6, 0)
    for name in vtok_fast.TokenDataset(undisturbed).names:
        with vtok_fast.io.video.open_video(output / f"{name}.mp4") as video:
            assert len(list(video.frames())) == 9 + int(Path(name).name[:4])


def test_remote_inputs_are_fetched(tmp_path):
    pytest.importorskip("fsspec")
    file = make_clip(tmp_path / "a", "mp4")
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        archive.write(file, "deep/a.mp4")
    progress = make_corpus([f"zip://::file://{tmp_path}/v.zip", str(file)], tmp_path / "out")
    assert progress.done == 2 and sorted(os.listdir(tmp_path / "out")) == ["a.mp4.tokens", "deep", NAME]
    one, other = (tmp_path / "out" / name for name in ("a.mp4.tokens", "deep/a.mp4.tokens"))
    assert one.read_bytes() == other.read_bytes()


def test_what_cannot_be_is_refused(videos, tmp_path):
    for options, message in (
        ({"workers": 0}, "workers=0"),
        ({"shards": 0}, "shards=0"),
        ({"engine": "slurm"}, "engine='slurm'"),
        ({"shards": 3, "detokenize": True}, "shards=3"),
    ):
        with pytest.raises(ValueError, match=message):
            make_corpus([str(videos)], tmp_path / "out", **options)
    with pytest.raises(RuntimeError, match="vidtok/nothing"):
        make_corpus([str(videos)], tmp_path / "out", model="vidtok/nothing")
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
if "vtok_fast.corpus.child" in sys.orig_argv:
    with open({count!r}, "a") as file:
        file.write("x")
        started = file.tell()
    if started <= {kills}:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kills", (1, 2))
def test_a_process_that_is_killed_while_it_loads_is_started_once_more(tmp_path, monkeypatch, kills):
    count = tmp_path / "count"
    (tmp_path / "sitecustomize.py").write_text(KILLED.format(count=str(count), kills=kills))
    monkeypatch.syspath_prepend(tmp_path)
    supervisor = Supervisor({"folder": str(tmp_path), "model": "vidtok/tiny", "accelerate": False})
    try:
        if kills == 1:
            assert supervisor.facts()["model"] == "vidtok/tiny"
        else:
            with pytest.raises(RuntimeError, match="loads vidtok/tiny ended its process by SIGKILL"):
                supervisor.facts()
    finally:
        supervisor.close()
    assert count.read_text() == "xx"
