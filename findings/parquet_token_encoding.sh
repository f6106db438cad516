#!/usr/bin/env bash
# The encoding asked for a Parquet column of token lists is ignored, unless the column's hidden name is used.
#
# One would guess: column_encoding={"tokens": "BYTE_STREAM_SPLIT"} on a column "tokens" of lists applies to
# it, and a name that no column has is an error.
# What happens: the encoding belongs to the leaf, whose path is "tokens.list.element", and a name that matches
# no leaf is accepted and does nothing: the tokens are written PLAIN and the file is 24 % bigger. "tokens",
# "tokens.list.item" and "nonsense" all do the same, and so does use_byte_stream_split=[...]. So look at the
# encodings in the footer after writing.
#
# Seen with: pyarrow 26.0.1, tokens of a codebook of 64000 as uint16, zstd. Source: apache/arrow pull requests
# 11724 and 6499; pyarrow's documentation of write_table ("specify the encoding scheme on a per column
# basis").
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'pyarrow==26.0.1' 'numpy==2.4.2'
venv/bin/python - <<'PY'
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

tokens = np.random.default_rng(0).integers(0, 64000, (400, 5120), np.uint16)
table = pa.table({"tokens": pa.array(list(tokens), pa.list_(pa.uint16()))})


def write(**options):
    pq.write_table(table, "tokens.parquet", compression="zstd", use_dictionary=False, **options)
    column = pq.ParquetFile("tokens.parquet").metadata.row_group(0).column(0)
    assert column.path_in_schema == "tokens.list.element", "the behavior has changed"
    assert pq.read_table("tokens.parquet") == table
    return "BYTE_STREAM_SPLIT" in column.encodings, os.path.getsize("tokens.parquet") / tokens.size


print("pyarrow", pa.__version__)
print("one would guess that it applies to the first name, and an error for the last")
sizes = {}
for name in ("tokens", "tokens.list.item", "tokens.list.element", "nonsense"):
    for options in ({"column_encoding": {name: "BYTE_STREAM_SPLIT"}}, {"use_byte_stream_split": [name]}):
        applied, sizes[name] = write(**options)
        print(f"{str(options):60} applied: {applied!s:5}  {sizes[name]:.3f} bytes a token")
        assert applied == (name == "tokens.list.element"), "the behavior has changed"
assert sizes["tokens"] / sizes["tokens.list.element"] > 1.2, "the behavior has changed"
PY
