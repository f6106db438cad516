"""Exports: the same tokens, small and repeatable files, and nothing where something fails."""

from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
import torch
from support.corpora import corpus

import vtok_fast
from vtok_fast.corpus.export import check_parquet, export

GRIDS = ((8, 16, 16), (2, 16, 16))
COUNT = 2560


@pytest.fixture(scope="module", params=[32768, 262144])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    return corpus(tmp_path_factory.mktemp("corpus") / "c.d", 7, request.param, 4, GRIDS, prefix="v1.0/clip")


def test_parquet(folder, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    files = export(folder, tmp_path / "out", "parquet", clips_per_file=3)
    assert [file.name for file in files] == [f"tokens-{n:05d}-of-00003.parquet" for n in range(3)]
    dataset = vtok_fast.TokenDataset(folder)
    tables = [parquet.read_table(file) for file in files]
    rows = [row for table in tables for row in table.to_pylist()]
    kind = "uint16" if dataset.settings["codes"] == 32768 else "int32"
    assert str(tables[0].schema.field("indices").type.value_type) == kind
    for row, clip in zip(rows, dataset, strict=True):
        assert row["clip"] == clip.name and row["indices"] == clip.indices.tolist()
        assert row["grids"] == [n for grid in clip.grids for n in grid]
    # Random indices of 15 and 18 bits: planes and zstd take off the byte that is zero, and most of another
    each = sum(file.stat().st_size for file in files) / (7 * COUNT)
    assert each < (2.3 if kind == "uint16" else 2.9)
    again = export(folder, tmp_path / "again", "parquet", clips_per_file=3)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_parquet_settings_that_had_no_effect_are_noticed(tmp_path):
    """pyarrow ignores a column that it does not know."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    from pyarrow import parquet

    table = pa.table({"indices": [np.arange(500, dtype=np.int32)]})
    leaf = "indices.list.element"
    for wrong in (
        {"use_byte_stream_split": ["indices"], "use_dictionary": False},
        {"use_byte_stream_split": True},
        {"use_byte_stream_split": [leaf], "use_dictionary": False},
    ):
        parquet.write_table(table, tmp_path / "one.parquet", **wrong)
        with pytest.raises(RuntimeError, match="parquet: indices.* is (encoded|compressed) as"):
            check_parquet(tmp_path / "one.parquet", leaf)
    with pytest.raises(RuntimeError, match="and not nothing"):
        check_parquet(tmp_path / "one.parquet", "nothing")


def test_webdataset(folder, tmp_path):
    webdataset = pytest.importorskip("webdataset", reason="webdataset is not installed")
    files = export(folder, tmp_path / "out", "webdataset", clips_per_file=4)
    dataset = vtok_fast.TokenDataset(folder)
    samples = list(webdataset.WebDataset([str(file) for file in files], shardshuffle=False).decode())
    assert len(samples) == 7
    for sample, clip in zip(samples, dataset, strict=True):
        assert sample["json"]["clip"] == clip.name and sample["json"]["model"] == "vidtok/some"
        assert np.array_equal(sample["indices.npy"], clip.indices) and sample["json"]["grids"] == [
            list(grid) for grid in clip.grids
        ]
    again = export(folder, tmp_path / "again", "webdataset", clips_per_file=4)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]
    with tarfile.open(files[0]) as archive:  # any reader of tar and npy can read it
        member = next(one for one in archive if one.name.endswith(".npy"))
        indices = np.load(io.BytesIO(archive.extractfile(member).read()))
    assert np.array_equal(indices, dataset[0].indices)


def test_an_export_is_whole_or_not_there(folder, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    calls = []
    plain = vtok_fast.TokenDataset.__getitem__

    def fails_late(self, index):
        calls.append(index)
        if len(calls) == 6:
            raise OSError("the disk is gone")
        return plain(self, index)

    monkeypatch.setattr(vtok_fast.TokenDataset, "__getitem__", fails_late)
    with pytest.raises(OSError, match="the disk is gone"):
        export(folder, tmp_path / "out", "parquet", clips_per_file=2)
    assert os.listdir(tmp_path) == []
    for options, message in (
        ({"to": "lance"}, "to='lance'"),
        ({"to": "parquet", "clips_per_file": 0}, "clips_per_file=0"),
    ):
        with pytest.raises(ValueError, match=message):
            export(folder, tmp_path / "out", **options)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens-00000-of-00001.parquet").write_text(json.dumps(1))
    with pytest.raises(ValueError, match="not an empty folder"):
        export(folder, tmp_path / "out", "parquet")
