"""Finding the videos of a corpus: what is named how, and what is refused."""

from __future__ import annotations

import json
import os
import zipfile

import pytest

from vtok_fast.corpus.inputs import find_clips, identity, safe_name


@pytest.fixture
def videos(tmp_path):
    """A folder of files that look like videos, and others."""
    root = tmp_path / "videos"
    for name in ("a.mp4", "b/c.MKV", "b/d e.webm", "b/notes.txt", ".hidden/e.mp4", "._a.mp4", "v1.0/f.avi"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


FOUND = ["videos/a.mp4", "videos/b/c.MKV", "videos/b/d e.webm", "videos/v1.0/f.avi"]


def names(*inputs, **options):
    return [clip.name for clip in find_clips(map(str, inputs), **options)]


def test_folders_patterns_and_files(videos, monkeypatch):
    assert names(videos) == FOUND
    assert [clip.address for clip in find_clips([str(videos)])] == [
        str(videos.parent / name) for name in FOUND
    ]
    assert names(videos / "*.mp4") == FOUND[:1] and names(f"{videos}/**/*.webm") == FOUND[2:3]
    assert names(videos / "b" / "c.MKV") == ["c.MKV"]
    monkeypatch.chdir(videos)
    assert names(".") == FOUND  # the same, wherever the command runs
    assert names("*.mp4") == ["videos/a.mp4"]
    assert names(videos, videos) == FOUND  # twice the same is once
    for missing in ("nothing", "*.nothing", "b/*.mp4"):
        with pytest.raises(FileNotFoundError, match="input: "):
            names(missing)


def test_a_name_does_not_depend_on_what_else_there_is(videos, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.mp4").touch()
    assert set(names(videos)) < set(names(videos, tmp_path / "more"))
    (tmp_path / "other" / "videos").mkdir(parents=True)
    (tmp_path / "other" / "videos" / "a.mp4").touch()
    with pytest.raises(ValueError, match="would both be named videos/a.mp4"):
        names(videos, tmp_path / "other" / "videos")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_manifests(videos, suffix):
    rows = [{"path": "a.mp4", "id": "first"}, {"path": str(videos / "b" / "c.MKV"), "id": ""}]
    file = videos / f"list.{suffix}"
    if suffix == "csv":
        file.write_text("\ufeffid,path\nfirst,a.mp4\n" + f',"{rows[1]["path"]}"\n')
    elif suffix == "jsonl":
        file.write_text("\n".join(map(json.dumps, [*rows, "b/d e.webm"])) + "\n\n")
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    clips = {clip.name: clip.address for clip in find_clips([str(file)])}
    expected = {"first": str(videos / "a.mp4"), safe_name(rows[1]["path"]): rows[1]["path"]}
    if suffix == "jsonl":
        expected["b/d e.webm"] = str(videos / "b" / "d e.webm")
    assert clips == expected
    with pytest.raises(ValueError, match="expected a column 'film'"):
        names(file, column="film")


def test_manifests_that_make_no_sense(tmp_path):
    file = tmp_path / "list.jsonl"
    for text, message in (
        ('{"path": "a"\n', "line 1 of .* is not JSON"),
        ("[1]\n", "neither an object nor an address"),
        ('"a"\n{"film": "a"}\n', "entry 2 of .* has no address"),
        ('{"path": 3}\n', "entry 1 of .* has no address"),
        ("\n", "holds no videos"),
    ):
        file.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            names(file)


def test_addresses_of_fsspec(videos, tmp_path):
    """A zip file stands for the others: it goes through the same interface as a bucket."""
    pytest.importorskip("fsspec")
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for name in ("a.mp4", "b/c.mkv", "b/notes.txt"):
            archive.writestr(name, name)
    whole = f"zip://::file://{tmp_path}/v.zip"
    clips = {clip.name: clip.address for clip in find_clips([whole])}
    assert clips == {
        "a.mp4": f"zip://a.mp4::file://{tmp_path}/v.zip",
        "b/c.mkv": f"zip://b/c.mkv::file://{tmp_path}/v.zip",
    }
    assert names(f"zip://b::file://{tmp_path}/v.zip") == ["b/c.mkv"]
    assert names(f"zip://*.mp4::file://{tmp_path}/v.zip") == ["a.mp4"]
    assert names(f"file://{videos}") == FOUND
    before = identity(clips["a.mp4"])
    assert before == identity(clips["a.mp4"]) != identity(clips["b/c.mkv"])
    with pytest.raises(ValueError, match="nosuch"):
        names("nosuch://bucket/videos")


def test_identities_change_with_the_file(videos):
    file = videos / "a.mp4"
    before = identity(str(file))
    assert identity(str(file)) == before
    os.utime(file, ns=(1, 1))
    assert identity(str(file)) != before
    with pytest.raises(FileNotFoundError):
        identity(str(videos / "nothing.mp4"))


def test_names_stay_in_the_folder():
    assert safe_name("../../etc/./passwd") == "etc/passwd" and safe_name("/a//b") == "a/b"
    assert safe_name("..\\a") == "a" and safe_name(".work/x") == "%2Ework/x" and safe_name("a\nb") == "a%0Ab"
    long = [safe_name("é" * 150 + str(n)) for n in range(2)]
    assert all(len(name.encode()) <= 200 for name in long) and long[0] != long[1]
    for nothing in ("", "/", "..", "."):
        with pytest.raises(ValueError, match="cannot name a clip"):
            safe_name(nothing)
