#!/usr/bin/env bash
# Equal tensors with equal metadata make different safetensors files.
#
# One would guess: saving the same tensors and the same metadata twice gives the same bytes, since the writer
# sorts the tensors; so files can be deduplicated, cached and checked by their hash.
# What happens: the metadata's keys are written in a random order that changes from call to call, within one
# process and with PYTHONHASHSEED fixed. With one key, or without metadata, the bytes are stable. Keep several
# values in one key, as JSON, or hash the contents instead of the file.
#
# Seen with: safetensors 0.8.0. Source: safetensors/safetensors issue 584 and pull request 790.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.4.2'
PYTHONHASHSEED=0 venv/bin/python - <<'PY'
import json

import numpy as np
import safetensors
from safetensors.numpy import load, save

CALLS = 200
tokens = {f"clip{i}": np.arange(i, i + 8, dtype=np.uint16) for i in range(3)}
print(f"safetensors {safetensors.__version__}: different files of {CALLS} equal calls; one would guess 1")
counts = {}
for keys in (0, 1, 2, 3):
    metadata = {name: "value" for name in ("codebook", "model", "window")[:keys]}
    files = {save(tokens, metadata=metadata or None) for _ in range(CALLS)}
    for file in files:
        assert all(np.array_equal(load(file)[name], tokens[name]) for name in tokens)
        header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
        assert header.get("__metadata__", {}) == metadata
    counts[keys] = len(files)
    print(f"{keys} metadata keys: {counts[keys]}")
assert counts == {0: 1, 1: 1, 2: 2, 3: 6}, "the behavior has changed"
PY
