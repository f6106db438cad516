"""Indices at their bits: exact for every width, the size that they promise, and old files still read."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vtok_fast import Tokens
from vtok_fast.io import bits
from vtok_fast.io.files import checksum
from vtok_fast.io.token_windows import TokenWindows, write_windows


def _tokens(high: int, grid: tuple[int, ...] = (1, 3, 5, 7), seed: int = 0) -> Tokens:
    indices = torch.randint(high, grid, dtype=torch.int32, generator=torch.Generator().manual_seed(seed))
    indices.view(-1)[0] = high - 1
    return Tokens("vidtok/tiny", {"levels": [8]}, (9, 40, 56), torch.float32, indices=indices)


@pytest.mark.parametrize("width", [*range(1, 32)])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 1000])
def test_every_width(width, count):
    indices = torch.randint(2**width, (count,), dtype=torch.int64).to(torch.int32).clamp_(min=0)
    if count:
        indices[-1] = 2**width - 1
    data, found = bits.pack_indices(indices)
    assert found == (width if count else 1) and len(data) == -(-count * found // 8)
    assert torch.equal(bits.unpack_indices(data, [count], found), indices)


@pytest.mark.parametrize("width", [1, 7, 18, 25, 26, 31])
def test_the_layout(width):
    """The lowest bit of the first index first: as numpy packs the bits one by one."""
    indices = torch.randint(2**width - 1, (999,), dtype=torch.int32)
    indices[-1] = 2**width - 1
    data, found = bits.pack_indices(indices)
    one_by_one = (indices.numpy()[:, None] >> np.arange(width)) & 1
    assert (
        found == width
        and data.numpy().tobytes() == np.packbits(one_by_one.astype(np.uint8), bitorder="little").tobytes()
    )


@pytest.mark.parametrize("high", [2, 625, 2**18])
def test_a_file_takes_the_bits_of_its_indices(tmp_path, high):
    tokens = _tokens(high)
    tokens.save(tmp_path / "a")
    tokens.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safe_open(tmp_path / "a", "pt") as file:
        assert file.get_tensor("tokens").numel() == -(-105 * (high - 1).bit_length() // 8)
    back = Tokens.load(tmp_path / "a")
    assert torch.equal(back.indices, tokens.indices) and back.indices.dtype == torch.int32


def _as_before(tokens: Tokens, path) -> None:
    """As files of int32 were written."""
    text = json.dumps(
        {
            "model": tokens.model,
            "config": tokens.config,
            "video_shape": list(tokens.video_shape),
            "dtype": "float32",
            "kind": "indices",
            "info": {},
        },
        sort_keys=True,
    )
    digest = hashlib.sha256(text.encode())
    checksum(digest, tokens.indices)
    metadata = {"format": "vtok-fast tokens 1", "tokens": text, "sha256": digest.hexdigest()}
    save_file({"tokens": tokens.indices}, path, metadata)


def test_files_of_int32_still_read(tmp_path):
    one, two = _tokens(625), _tokens(300, seed=1)
    _as_before(one, tmp_path / "old")
    two.save(tmp_path / "new")
    assert torch.equal(Tokens.load(tmp_path / "old").indices, one.indices)
    write_windows(tmp_path / "both", [tmp_path / "old", tmp_path / "new"], {})
    windows = TokenWindows(tmp_path / "both")
    assert all(torch.equal(w.indices, t.indices) for w, t in zip(windows, (one, two)))


@pytest.mark.parametrize(
    ("shape", "width", "said"),
    [
        ([105], 0, "bits"),
        ([105], 32, "bits"),
        ([105], "10", "bits"),
        ([-1, 105], 10, "grid"),
        (105, 10, "grid"),
        ([106], 10, "for 106 indices of 10 bits"),
        ([1 << 60], 1, "indices of 1 bits"),
    ],
)
def test_what_does_not_go_together_is_refused(shape, width, said):
    data, _ = bits.pack_indices(_tokens(625).indices)
    with pytest.raises(ValueError, match=said):
        bits.unpack_indices(data, shape, width)
