#!/usr/bin/env bash
# Lance packs token ids to their bits in a list column, and writes them raw in a fixed-size list.
#
# One would guess: a fixed-size list, which stores no lengths, is the smaller of the two for clips that all
# have the same number of tokens.
# What happens: the values of a list are bit-packed, 2.3 bytes for an 18-bit id held in an int32, while a
# fixed-size list writes all 4 bytes of each, whatever the ids are. For ids of 12 bits it is 1.6 against 4.
# The fixed-size list is the natural type of a clip's token grid, so the natural schema is the large one, and
# nothing says so.
#
# Seen with: pylance 14.0.2 (storage version 2.2), pyarrow 26.0.1. Source: lance-format/lance discussion 6819.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'pylance==14.0.2' 'pyarrow==26.0.1' 'numpy==2.4.2'
LANCE_LOG=error venv/bin/python - <<'PY'
import pathlib

import lance
import numpy as np
import pyarrow as pa

CLIPS, TOKENS = 400, 5120


def bytes_per_token(name, column):
    table = pa.table({"tokens": column})
    dataset = lance.write_dataset(table, name)
    assert dataset.data_storage_version == "2.2"
    assert dataset.to_table()["tokens"].combine_chunks().flatten() == column.flatten()
    return sum(f.stat().st_size for f in pathlib.Path(name, "data").rglob("*")) / (CLIPS * TOKENS)


print(f"pylance {lance.__version__}: bytes a token; one would guess that the fixed-size list is the smaller")
for bits, expected in ((18, 2.31), (12, 1.56)):
    ids = np.random.default_rng(0).integers(0, 2**bits, (CLIPS, TOKENS), np.int32)
    lists = bytes_per_token(f"list{bits}", pa.array(list(ids), pa.list_(pa.int32())))
    fixed = bytes_per_token(f"fixed{bits}", pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), TOKENS))
    print(f"{bits}-bit ids as int32: list {lists:.2f}, fixed-size list {fixed:.2f}")
    assert abs(lists - expected) < 0.05 and abs(fixed - 4) < 0.05, "the behavior has changed"
PY
