"""Clips of ten kinds with bad ones among them, up to two hundred, killed twenty times at random moments; and
the memory of two thousand."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("av")

from support.clips import make_clip, make_folder, poisoned, workers_of  # noqa: E402
from support.corpora import outcome  # noqa: E402

from vtok_fast.corpus.manifest import NAME  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.volatile]
KILLS = 20


def start(videos, output, env, *options):
    command = [sys.executable, "-m", "vtok_fast.cli", "corpus", str(videos), "-o", str(output), "--json"]
    return subprocess.Popen([*command, *options], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(run):
    """Waits for a run that nobody kills: 1 says that a clip failed in it, not only in one before."""
    out, error = run.communicate()
    assert out, error.decode()
    assert run.returncode == (json.loads(out)["failed"] > 0), error.decode()


def lines(folder):
    return (folder / NAME).read_bytes().count(b"\n") if (folder / NAME).is_file() else 0


@pytest.mark.parametrize("good,bad", [(30, 6), (180, 20)])
def test_every_result_is_the_undisturbed_one(good, bad, tmp_path):
    """Of the driver, or of the process that works, whichever chance says. A worker's death counts against its
    clip, so each corpus sees one at most; the driver may die as often as it comes."""
    videos, env = make_folder(tmp_path / "videos", good, bad), poisoned(tmp_path / "hook")
    options = "--shards", str(good // 6)
    whole = start(videos, tmp_path / "whole", env, *options)
    facts = json.loads(whole.communicate()[0])
    assert (facts["done"], facts["failed"]) == (good, bad)
    expected = outcome(tmp_path / "whole")
    kills, corpora = 0, 0
    while kills < KILLS or corpora < 2:
        output, corpora, hurt = tmp_path / f"c{corpora}", corpora + 1, False
        while True:
            run, before = start(videos, output, env, *options), lines(output)
            wanted = before + random.randrange(0, (good + bad) // 4)
            pause = random.random() / 4
            while run.poll() is None and lines(output) < wanted:
                time.sleep(0.005)
            time.sleep(pause)
            if run.poll() is not None or kills >= KILLS:
                ended(run)
                break
            kills += 1
            working = workers_of(run.pid)
            if working and not hurt and random.random() < 0.5:
                hurt = True
                os.kill(working[0], signal.SIGKILL)
                ended(run)  # it goes on with another one
                break
            run.kill()
            run.communicate()
        found = outcome(output)
        assert {k: (v, found[0].get(k)) for k, v in expected[0].items() if found[0].get(k) != v} == {}
        assert found == expected
    print(f"{kills} kills over {corpora} corpora")


def test_memory_is_flat(tmp_path):
    """From clip 400 to 2,000 the driver keeps a line for each (at most 4 KiB), the worker nothing; and 16 MiB
    for what the allocator and the libraries round up."""
    (tmp_path / "videos").mkdir()
    clip = make_clip(tmp_path / "videos" / "0000", "mp4", 5)
    for number in range(1, 2000):
        os.link(clip, clip.with_name(f"{number:04d}.mp4"))
    run = start(tmp_path / "videos", tmp_path / "out", poisoned(tmp_path / "hook"), "--shards", "500")

    def memory():
        pids = [run.pid, *workers_of(run.pid)]
        return [
            int(open(f"/proc/{pid}/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") for pid in pids
        ]

    while lines(tmp_path / "out") < 400:
        assert run.poll() is None
        time.sleep(0.1)
    early = memory()
    while lines(tmp_path / "out") < 1950:
        assert run.poll() is None
        late = memory()
        time.sleep(0.1)
    assert json.loads(run.communicate()[0])["done"] == 2000
    print("MiB at 400 clips and at 1,950:", [[round(n / 2**20) for n in one] for one in (early, late)])
    bounds = [16 * 2**20 + 4096 * 1600, 16 * 2**20]
    assert all(b - a < bound for a, b, bound in zip(early, late, bounds, strict=True))
