"""`Tokens`: what a tokenizer makes of a video, and the file that holds it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_fast.io import bits
from vtok_fast.io.files import checksum, open_tensors, write_atomically, write_tensor

FORMAT = "vtok-fast tokens 1"
DROPPED = -1  # the index of a token that was not kept


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one batch of videos of equal size, with what is needed to decode them.

    Attributes:
        model: the system and the name of its configuration, as in "vidtok/fsq_causal_488_32768".
        config: the configuration itself, JSON values only.
        video_shape: (T, H, W) of each video, in frames and pixels.
        dtype: of the video that was encoded, and of the one that `decode` returns.
        indices: (B, t, h, w) int32, of a model with a codebook, -1 where a token was dropped; else None.
        latents: (B, C, t, h, w) floating point, of a model without one; else None.
        info: what else is known, JSON values only, such as the frames per second; goes into the file, and no
            model reads it.
    """

    model: str
    config: dict[str, Any]
    video_shape: tuple[int, int, int]
    dtype: torch.dtype
    indices: Tensor | None = None
    latents: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.indices is None) == (self.latents is None):
            raise ValueError("Tokens: give either indices or latents")
        if self.indices is not None and (self.indices.dim() != 4 or self.indices.dtype != torch.int32):
            raise ValueError(
                f"indices must be (B, t, h, w) int32, not {tuple(self.indices.shape)} {self.indices.dtype}"
            )
        if self.latents is not None and (self.latents.dim() != 5 or not self.latents.is_floating_point()):
            raise ValueError(
                "latents must be (B, C, t, h, w) floating point, not "
                f"{tuple(self.latents.shape)} {self.latents.dtype}"
            )
        if len(self.video_shape) != 3 or min(self.video_shape) < 1:
            raise ValueError(f"video_shape must be (T, H, W), each at least 1, not {tuple(self.video_shape)}")

    @property
    def data(self) -> Tensor:
        """The indices or the latents, whichever there are."""
        data = self.latents if self.indices is None else self.indices
        assert data is not None
        return data

    @property
    def batch(self) -> int:
        return self.data.shape[0]

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w)"""
        t, h, w = self.data.shape[-3:]
        return t, h, w

    def to(self, *args: Any, **kwargs: Any) -> Tokens:
        """On another device; as `Tensor.to`, but the indices stay int32."""
        moved = self.data.to(*args, **kwargs)
        return self._with(moved if self.indices is None else moved.to(torch.int32))

    def clip(self, index: int) -> Tokens:
        """Those of one video of the batch."""
        return self._with(self.data[index : index + 1])

    @staticmethod
    def stack(parts: Sequence[Tokens]) -> Tokens:
        """The tokens of several videos of one size, as one batch.

        Raises ValueError if they come from different models or sizes, or if there are none.
        """
        first = _same(parts, "model", "config", "dtype", "video_shape")
        return first._with(torch.cat([part.data for part in parts]))

    @staticmethod
    def cat(parts: Sequence[Tokens]) -> Tokens:
        """The tokens of chunks that follow one another in time, as one.

        Raises ValueError if they come from different models or sizes, or if there are none.
        """
        first = _same(parts, "model", "config", "dtype", "batch")
        for part in parts[1:]:
            if part.video_shape[1:] != first.video_shape[1:]:
                raise ValueError(
                    f"parts: (H, W) is {first.video_shape[1:]} in the first one, {part.video_shape[1:]} in "
                    f"another"
                )
        data = torch.cat([part.data for part in parts], dim=-3)
        shape = (sum(part.video_shape[0] for part in parts), *first.video_shape[1:])
        return first._with(data, video_shape=shape)

    def _with(self, data: Tensor, **changes: Any) -> Tokens:
        """The same with other data, of the same kind."""
        return replace(self, **{"latents" if self.indices is None else "indices": data, **changes})

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum. A file that is there is replaced only once the new one is
        complete.

        Indices are stored at the bits that the highest one needs. Where tokens were dropped, what is stored
        is the packed stream (`vtok_fast.PackedTokens.to_bytes`): a bit for each position, and for each kept
        token those bits. Equal tokens give equal files.

        Raises OSError if it cannot be written; then nothing is left behind.
        """
        data, kind = self.data.detach().cpu().contiguous(), "latents"
        form: dict[str, Any] = {}
        if self.indices is not None and bool((data == DROPPED).any()):
            data, kind = _pack(data), "packed"
        elif self.indices is not None:
            kind, form["grid"] = "bits", list(data.shape)
            data, form["bits"] = bits.pack_indices(data)
        header = {
            "model": self.model,
            "config": self.config,
            "video_shape": list(self.video_shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "kind": kind,
            **form,
            "info": self.info,
        }
        text = json.dumps(header, sort_keys=True)
        digest = hashlib.sha256(text.encode())
        checksum(digest, data)
        metadata = {"format": FORMAT, "tokens": text, "sha256": digest.hexdigest()}
        write_atomically(path, lambda temporary: write_tensor(temporary, "tokens", data, metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokens:
        """Read what `save` wrote, or the windows of a long video (`TokenWindows`) as a batch.

        Raises FileNotFoundError, or ValueError for a file that is damaged, holds something else, or windows
        of different lengths.
        """
        from vtok_fast.io.token_windows import READABLE, TokenWindows

        path = Path(path)
        file, metadata = open_tensors(path)
        if metadata.get("format") in READABLE:
            windows = TokenWindows(path)
            if windows[0].video_shape != windows[-1].video_shape:
                raise ValueError(
                    f"path: {path} holds {len(windows)} windows, of which the last one is shorter; read "
                    f"them one by "
                    "one, with vtok_fast.io.token_windows.TokenWindows"
                )
            return replace(cls.stack(list(windows)), info=windows.info)
        if metadata.get("format") != FORMAT or "tokens" not in file.keys():  # noqa: SIM118 (not a dict)
            raise ValueError(
                f"path: {path} is not a tokens file of this version (format {metadata.get('format')!r}, "
                f"wanted {FORMAT!r})"
            )
        data, digest = file.get_tensor("tokens"), hashlib.sha256(metadata.get("tokens", "").encode())
        checksum(digest, data)
        if metadata.get("sha256") != digest.hexdigest():
            raise ValueError(f"path: {path} is damaged, its checksum does not match")
        try:
            return cls.from_header(json.loads(metadata["tokens"]), data)
        except (KeyError, TypeError, ValueError, RecursionError) as error:  # sound, but not of our making
            raise ValueError(
                f"path: {path} does not describe tokens ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def from_header(cls, header: dict[str, Any], data: Tensor) -> Tokens:
        """Those that a file describes and holds. Raises KeyError, TypeError or ValueError if it makes no
        sense."""
        kind, dtype, shape = (
            header["kind"],
            getattr(torch, header["dtype"], None),
            tuple(header["video_shape"]),
        )
        if kind not in ("bits", "indices", "latents", "packed"):
            raise ValueError(f"kind: expected bits, indices, latents or packed, got {kind!r}")
        if kind == "bits":
            data, kind = bits.unpack_indices(data, header["grid"], header["bits"]), "indices"
        elif kind == "packed":
            data, kind = _unpack(data), "indices"
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype: expected a torch.dtype's name, got {header['dtype']!r}")
        for name, value, expected in (
            ("model", header["model"], str),
            ("config", header["config"], dict),
            ("info", header.get("info", {}), dict),
            *(("video_shape", n, int) for n in shape),
        ):
            if not isinstance(value, expected):
                raise TypeError(f"{name}: expected {expected.__name__}, got {value!r}")
        t, h, w = shape
        return cls(
            header["model"], header["config"], (t, h, w), dtype, info=header.get("info", {}), **{kind: data}
        )


def _pack(indices: Tensor) -> Tensor:
    """Indices with dropped ones as bytes, (N) uint8."""
    from vtok_fast.ops.token_packing import pack_tokens

    packed = pack_tokens(indices, indices != DROPPED)
    return torch.frombuffer(bytearray(packed.to_bytes(max(2, int(indices.max()) + 1))), dtype=torch.uint8)


def _unpack(data: Tensor) -> Tensor:
    """What `_pack` made. Raises ValueError for other bytes."""
    from vtok_fast.ops.token_packing import PackedTokens, unpack_tokens

    indices = unpack_tokens(PackedTokens.from_bytes(data.numpy().tobytes()), fill=DROPPED)
    if not isinstance(indices, Tensor):
        raise ValueError("tokens: the packed clips are of several sizes")
    return indices


def _same(parts: Sequence[Tokens], *names: str) -> Tokens:
    """The first of parts, which agree in these attributes."""
    if not parts:
        raise ValueError("parts: there is nothing to concatenate")
    for part in parts[1:]:
        for name in names:
            if getattr(part, name) != getattr(parts[0], name):
                raise ValueError(
                    f"parts: {name} is {getattr(parts[0], name)} in the first one, {getattr(part, name)} in "
                    f"another"
                )
    return parts[0]
