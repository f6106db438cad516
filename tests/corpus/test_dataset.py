"""Shards and `TokenDataset`: every index comes back, and nothing damaged, cut off or foreign is read."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.corpora import corpus, settings, tokens_file

import vtok_fast
from vtok_fast.corpus.manifest import NAME, read_manifest, writing
from vtok_fast.corpus.shard import SafeTensors, Shard, storage_of, write_shard
from vtok_fast.io.bits import pack, packed_bytes, unpack, width_of
from vtok_fast.io.files import digest_of, write_header
from vtok_fast.io.token_windows import TokenWindows

CODES = [2, 256, 32768, 65536, 65537, 262144, 2**31]


@given(st.integers(1, 31), st.integers(0, 200), st.integers(0, 20), st.integers(0, 20))
def test_bits_are_those_of_packed_tokens(width, count, before, after):
    values = torch.randint(2**width, (count,)).numpy()
    packed = pack(values, width)
    assert len(packed) == packed_bytes(count, width)
    naive = (values[:, None] >> np.arange(width)) & 1  # the definition: numbers, then bits, lowest first
    assert packed == np.packbits(naive.astype(np.uint8), bitorder="little").tobytes()
    data = os.urandom(before) + packed + os.urandom(after)
    found = unpack(data, count, width, before)
    assert found.dtype == np.int32 and (found == values).all()


def test_bits_refuse_what_does_not_fit():
    for values in ([-1], [0, 8]):
        with pytest.raises(ValueError, match="values: expected 3 bits"):
            pack(np.array(values), 3)
    with pytest.raises(ValueError, match="data: 3 numbers of 18 bits"):
        unpack(bytes(6), 3, 18)
    for codes in (0, 2**31 + 1):
        with pytest.raises(ValueError, match=f"codes={codes}"):
            width_of(codes)


@pytest.mark.parametrize("shard", [None, 3])
@pytest.mark.parametrize("codes", CODES)
def test_every_clip_comes_back(tmp_path, codes, shard):
    folder = corpus(tmp_path / "c", 7, codes, shard)
    dataset = vtok_fast.TokenDataset(folder, verify=True)
    assert len(dataset) == 7 and dataset.lengths.tolist() == [36] * 7
    torch.manual_seed(torch.initial_seed())  # what `corpus` drew, again
    again = corpus(tmp_path / "again", 7, codes)
    for number, clip in enumerate(dataset):
        windows = TokenWindows(again / f"{clip.name}.tokens")
        assert clip.indices.dtype == torch.int32 and clip.grids == ((2, 3, 4), (1, 3, 4))
        assert all(torch.equal(a, b.indices[0]) for a, b in zip(clip.windows, windows, strict=True))
        for one, other in zip(dataset.tokens(number), windows, strict=True):
            assert torch.equal(one.indices, other.indices) and one.info == other.info
            assert one.video_shape == other.video_shape and one.model == other.model
    assert dataset[-1].name == dataset[6].name
    with pytest.raises(IndexError, match="index=7"):
        dataset[7]


def test_a_shard_costs_its_bits(tmp_path):
    """The data of 18 bit tokens takes 2.25 bytes each, that of up to 16 bits 2."""
    grids = [(8, 16, 16)]
    for codes, each in ((32768, 2), (262144, 2.25)):
        files = [(f"{n}", tokens_file(tmp_path / f"{codes}-{n}", codes, grids)) for n in range(4)]
        write_shard(tmp_path / "shard", files, codes)
        spans = [one[3] - one[2] for one in SafeTensors(tmp_path / "shard").tensors.values()]
        assert spans == [each * 8 * 16 * 16] * 4


def test_equal_clips_give_equal_bytes_and_their_own_files(tmp_path):
    """Also of dropped tokens, which a shard keeps as they are."""
    for dropped in (False, True):
        files = [
            (str(n), tokens_file(tmp_path / f"{n}", 1000, [(2, 3, 5), (1, 3, 5)], dropped)) for n in range(3)
        ]
        digests = [write_shard(tmp_path / name, files, 1000) for name in ("one", "other")]
        written = (tmp_path / "one").read_bytes()
        assert written == (tmp_path / "other").read_bytes()
        assert digests == [hashlib.sha256(written).hexdigest()] * 2
        shard = Shard(tmp_path / "one")
        shard.check()
        for number, (_, file) in enumerate(files):
            shard.tokens_file(number, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == file.read_bytes()


def described(path, change):
    """Write a file of windows anew, sound, after `change(header, tensors)`, of uint8 or int32 arrays."""
    file = SafeTensors(path)
    data, header = path.read_bytes(), json.loads(file.metadata["tokens"])
    tensors = [np.frombuffer(data[one[2] : one[3]], np.uint8) for one in file.tensors.values()]
    change(header, tensors)
    entries, end = {}, 0
    text = json.dumps(header, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for number, tensor in enumerate(tensors):
        digest.update(f"torch.{tensor.dtype}{tensor.shape}".encode() + tensor.tobytes())
        name = {"uint8": "U8", "int32": "I32"}[str(tensor.dtype)]
        place = [end, end + tensor.nbytes]
        entries[f"{number:09d}"] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": place}
        end += tensor.nbytes
    metadata = {"format": file.metadata["format"], "tokens": text, "sha256": digest.hexdigest()}
    with path.open("wb") as out:
        write_header(out, {"__metadata__": metadata, **entries})
        out.write(b"".join(tensor.tobytes() for tensor in tensors))


def from_before_packing(header, tensors, only=(0, 1)):
    for number in only:
        window = header["windows"][number]
        grid, width = window.pop("grid"), window.pop("bits")
        window["kind"] = "indices"
        tensors[number] = unpack(tensors[number], math.prod(grid), width).reshape(grid)


def in_manifest(folder, paths):
    """Let the manifest know files as they are now."""
    rows = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    for row in rows:
        if row.get("clip") in paths:
            row["bytes"], row["sha256"] = paths[row["clip"]].stat().st_size, digest_of(paths[row["clip"]])
    (folder / NAME).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("codes", [512, 262144])
@pytest.mark.parametrize("only", [(0,), (1,), (0, 1)])
def test_windows_from_before_packing_are_read(tmp_path, codes, only):
    """int32, also beside packed ones: by themselves, and in a shard that gives the same file back."""
    folder = corpus(tmp_path / "c", 3, codes)
    before = [clip.indices for clip in vtok_fast.TokenDataset(folder)]
    paths = {path.name.removesuffix(".tokens"): path for path in sorted(folder.glob("*.tokens"))}
    for path in paths.values():
        described(path, partial(from_before_packing, only=only))
    in_manifest(folder, paths)
    dataset = vtok_fast.TokenDataset(folder, verify=True)
    assert all(torch.equal(clip.indices, one) for clip, one in zip(dataset, before, strict=True))
    assert torch.equal(torch.cat([one.indices.flatten() for one in dataset.tokens(1)]), before[1])
    write_shard(tmp_path / "shard", list(paths.items()), codes)
    shard = Shard(tmp_path / "shard")
    for number, path in enumerate(paths.values()):
        shard.tokens_file(number, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_dropped_tokens_are_refused(tmp_path):
    folder = corpus(tmp_path / "c", 2)
    path = folder / "clip-0001.mp4.tokens"
    tokens_file(path, 32768, [(2, 3, 4), (1, 3, 4)], dropped=True)
    in_manifest(folder, {"clip-0001.mp4": path})
    with pytest.raises(ValueError, match=r"clip-0001.mp4 in .* has dropped tokens; read it by `tokens`"):
        vtok_fast.TokenDataset(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bits", 14),
        ("bits", 32),
        ("bits", "15"),
        ("grid", [1, 2, 3, 5]),
        ("grid", [2, 1, 3, 4]),
        ("grid", [24]),
    ],
)
def test_windows_that_their_header_does_not_describe_are_refused(tmp_path, key, value):
    """Read by themselves and into a shard, whether or not the number of bytes tells."""
    folder = corpus(tmp_path / "c", 1)
    path = folder / "clip-0000.mp4.tokens"
    described(path, lambda header, _: header["windows"][0].update({"bits": 15, key: value}))
    in_manifest(folder, {"clip-0000.mp4": path})
    for read in (
        lambda: vtok_fast.TokenDataset(folder),
        lambda: write_shard(tmp_path / "shard", [("a", path)], 32768),
    ):
        with pytest.raises(ValueError, match="does not describe tokens"):
            read()


def test_a_shard_that_fails_leaves_nothing(tmp_path):
    files = [(str(n), tokens_file(tmp_path / str(n), 1000, [(2, 3, 5)])) for n in range(8)]
    data = bytearray(files[6][1].read_bytes())
    data[-1] ^= 1
    files[6][1].write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="damaged"):
        write_shard(tmp_path / "out" / "shard", files, 1000)
    with pytest.raises(ValueError, match="codebook has 10 entries"):
        write_shard(tmp_path / "out" / "shard", files[:3], 10)
    other = tokens_file(tmp_path / "other", 1000, [(2, 3, 5)], model="vidtok/other")
    with pytest.raises(ValueError, match="another model"):
        write_shard(tmp_path / "out" / "shard", [files[0], ("other", other)], 1000)
    assert os.listdir(tmp_path / "out") == []


def test_a_cut_or_damaged_shard_is_told_from_a_whole_one(tmp_path):
    """Cut at every boundary of a tensor too, where what is left is sound in itself."""
    folder = corpus(tmp_path / "c", 4, shard=4)
    path = folder / "tokens-000000.safetensors"
    whole = path.read_bytes()
    tensors = SafeTensors(path).tensors
    for end in sorted({0, 5, 100, *(one[2] for one in tensors.values()), len(whole) - 1}):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cut off|no safetensors|not a safetensors"):
            vtok_fast.TokenDataset(folder)
    files = [(f"clip-{n:04d}.mp4", tokens_file(tmp_path / str(n), 32768, [(2, 3, 4)])) for n in range(3)]
    write_shard(path, files, 32768)
    with pytest.raises(ValueError, match="the manifest says"):
        vtok_fast.TokenDataset(folder)
    damaged = bytearray(whole)
    damaged[-3] ^= 4
    path.write_bytes(damaged)
    vtok_fast.TokenDataset(folder)  # reads headers alone
    with pytest.raises(ValueError, match="damaged"):
        vtok_fast.TokenDataset(folder, verify=True)


def test_models_do_not_share_a_corpus(tmp_path):
    folder = corpus(tmp_path / "c", 2, 32768, shard=2)
    with pytest.raises(ValueError, match="codes=32768, not 262144"), writing(folder, settings(262144)):
        pass
    assert [storage_of(codes) for codes in CODES[3:6]] == ["uint16", "bits17", "bits18"]
    other = corpus(tmp_path / "o", 2, 262144, shard=2)
    (folder / "tokens-000000.safetensors").write_bytes((other / "tokens-000000.safetensors").read_bytes())
    rows = (other / NAME).read_text().splitlines()[1:]
    first = (folder / NAME).read_text().splitlines()[0]
    (folder / NAME).write_text("\n".join([first, *rows]) + "\n")
    with pytest.raises(ValueError, match="cannot share a corpus"):
        vtok_fast.TokenDataset(folder)


def test_manifest_lines_count_once_they_are_complete(tmp_path):
    folder = corpus(tmp_path / "c", 3)
    path = folder / NAME
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for end in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_bytes(whole[:end])
        assert len(read_manifest(folder).clips) == 2
    path.write_bytes(whole[:-5])
    row = json.loads(lines[-1])
    with writing(folder, settings()) as manifest:
        manifest.append([row])
    assert path.read_bytes() == whole
    path.write_bytes(lines[0] + b"{}\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 of .* is damaged"):
        read_manifest(folder)
    with writing(folder.with_name("new"), settings()) as manifest:
        with pytest.raises(OSError, match="another run"), writing(folder.with_name("new"), settings()):
            pass
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="thesis.txt"), writing(tmp_path / "theirs", settings()):
        pass


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no corpus"):
        vtok_fast.TokenDataset(tmp_path)
    with writing(tmp_path, settings()):
        pass
    with pytest.raises(ValueError, match="no clips yet"):
        vtok_fast.TokenDataset(tmp_path)


def test_few_files_stay_open(tmp_path, monkeypatch):
    """As many maps as allowed, whatever is read; a copy for another process brings none along."""
    monkeypatch.setattr("vtok_fast.corpus.dataset.OPEN", 3)
    dataset = vtok_fast.TokenDataset(corpus(tmp_path / "c", 12, shard=2))
    kept = [clip.indices for clip in dataset]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert all(torch.equal(clip.indices, one) for clip, one in zip(dataset, kept, strict=True))
    assert len(dataset._maps) == 3 and len(os.listdir("/proc/self/fd")) <= before
    copy = pickle.loads(pickle.dumps(dataset))
    assert not copy._maps and torch.equal(copy[5].indices, kept[5])


@pytest.mark.volatile
@pytest.mark.parametrize("codes", [65536, 262144])
def test_reading_is_fast(tmp_path: Path, codes):
    """100 M tokens a second of this process's own time, files in the cache; the best of many turns."""
    dataset = vtok_fast.TokenDataset(corpus(tmp_path / "c", 24, codes, 12, ((16, 32, 32),)))
    best = 0.0
    for _ in range(40):
        start = time.process_time()
        count = sum(len(dataset[number].indices) for number in range(24))
        best = max(best, count / (time.process_time() - start))
        if best >= 100e6:
            return
    raise AssertionError(f"{best / 1e6:.0f} M tokens a second")
