"""`PackedTokens`: a ragged batch of tokens, the bytes that store one, and the errors that a device reports
late."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtok_fast.dispatch.lasting import keep, refuse_recording

MAGIC = b"VTKP"
VERSION = 1
_HEADER = struct.Struct("<4sBBxxIQ")  # magic, version, dimensions of a grid, clips, codes

# ---- what a device found and nobody has waited for yet -----------------------------------------------------

BUDGET, CAPACITY, ROWS, POSITION, SCOPE = 1, 2, 4, 8, 16
_MESSAGES = {
    BUDGET: "budget: a value was outside 0 to the number of tokens, and was clamped",
    CAPACITY: "capacity: more tokens were kept than fit, and the last ones were left out",
    ROWS: "packed: the mask kept more positions than there are values; those without one were filled",
    POSITION: "keep: a position was outside its clip, and was left out",
    SCOPE: "scope: a range was outside the keys, out of order or overlapped another, and was clamped",
}
_flags: dict[torch.device, Any] = {}


def error_flag(device: torch.device) -> Tensor:
    """The device's int32 (1,), into which kernels OR what they found wrong.

    Raises RuntimeError where it would have to be made while a CUDA graph is recorded.
    """
    if device not in _flags:
        refuse_recording(device, "the flag for errors")
    return keep(_flags, device, device, lambda: torch.zeros(1, dtype=torch.int32, device=device))


def note_error(wrong: Tensor, error: int) -> None:
    """Flags an error on the device of ``wrong`` where any of it is true, without waiting for it. Not under
    ``torch.func``, whose transformations may not write to the flag."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return
    error_flag(wrong.device).bitwise_or_(wrong.any().to(torch.int32) * error)


def raise_device_errors(device: torch.device) -> None:
    """Waits for the device and raises ValueError for what calls since the last time had to clamp."""
    if device not in _flags:
        return
    flag = error_flag(device)
    found = int(flag)
    if found:
        flag.zero_()
        raise ValueError("; ".join(message for bit, message in _MESSAGES.items() if found & bit))


# ---- the tokens --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PackedTokens:
    """The kept tokens of a batch of clips, clip by clip, each in the order of its positions.

    Attributes:
        values: (N, C), or (N,) for tokens without channels.
        indices: int32 (N,), the flat position of each within its clip.
        cu_seqlens: int32 (B + 1,); clip b has the rows cu_seqlens[b] to cu_seqlens[b + 1].
        mask: bool (B, *grid); for clips of several sizes flat and concatenated.
        grids: the size of each clip, where they are not all that of ``mask``; else None.
        bounded: N is a capacity: rows from cu_seqlens[B] on are not tokens; there values are 0 and indices
            -1.
    """

    values: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    mask: Tensor
    grids: tuple[tuple[int, ...], ...] | None = None
    bounded: bool = False

    @property
    def clips(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def clip_grids(self) -> tuple[tuple[int, ...], ...]:
        """The grid of every clip."""
        return self.grids or (tuple(self.mask.shape[1:]),) * self.clips

    def with_values(self, values: Tensor) -> PackedTokens:
        """The same positions with other values, as after a layer or `vtok_fast.fsq_decode`."""
        if len(values) != len(self.values):
            raise ValueError(f"values: expected {len(self.values)} rows, got shape {tuple(values.shape)}")
        return replace(self, values=values)

    @staticmethod
    def cat(parts: Sequence[PackedTokens]) -> PackedTokens:
        """All clips of several batches, of any sizes, as one. Raises ValueError for none, or for one with a
        capacity."""
        if not parts or any(part.bounded for part in parts):
            raise ValueError("parts: expected one or more, packed without a capacity")
        if len(parts) == 1:
            return parts[0]
        starts = [0]
        for part in parts:
            starts.append(starts[-1] + len(part.values))
        ends = [part.cu_seqlens[1:] + start for part, start in zip(parts, starts)]
        return PackedTokens(
            torch.cat([part.values for part in parts]),
            torch.cat([part.indices for part in parts]),
            torch.cat([parts[0].cu_seqlens[:1], *ends]),
            torch.cat([part.mask.flatten() for part in parts]),
            sum((part.clip_grids for part in parts), ()),
        )

    def to_bytes(self, codes: int) -> bytes:
        """The stored form of integer tokens: one bit per position, and ceil(log2(codes)) bits per kept token.

        Little-endian: "VTKP", version 1 (1 byte), d, the dimensions of a grid (1 byte), two zero bytes, the
        number of clips (4 bytes), codes (8 bytes); 4 bytes per dimension of each clip; the masks of all
        clips, concatenated, first position in the lowest bit, padded with zeros to a byte; the values
        likewise; the CRC-32 of all that (4 bytes). Waits for the device.

        Args:
            codes: the size of the codebook, at most 2^31.

        Raises:
            TypeError: the values are not integers with one number per token.
            ValueError: a value is outside 0 to codes - 1, such as the -1 of a NaN, or the mask has another
                number of tokens.
        """
        if self.values.is_floating_point() or self.values.dim() != 1:
            raise TypeError(
                f"values: expected integers (N,), such as FSQ indices, got {self.values.dtype} "
                f"{tuple(self.values.shape)}"
            )
        if not 1 <= codes <= 2**31:
            raise ValueError(f"codes: expected 1 to 2**31, got {codes}")
        raise_device_errors(self.values.device)
        mask = self.mask.flatten().cpu().numpy()
        values = self.values[: int(self.cu_seqlens[-1])].cpu().numpy().astype(np.int64)
        if np.count_nonzero(mask) != len(values):
            raise ValueError(f"mask: keeps {np.count_nonzero(mask)} positions of {len(values)} values")
        if len(values) and (values.min() < 0 or values.max() >= codes):
            raise ValueError(
                f"values: expected 0 to {codes - 1}, got {values.min() if values.min() < 0 else values.max()}"
            )
        grids = self.clip_grids
        dims = len(self.grids[0]) if self.grids else self.mask.dim() - 1
        sizes = [size for grid in grids for size in grid]
        if any(len(grid) != dims for grid in grids):
            raise ValueError(f"grids: expected the same number of dimensions for all clips, got {grids}")
        body = _HEADER.pack(MAGIC, VERSION, dims, len(grids), codes) + struct.pack(f"<{len(sizes)}I", *sizes)
        body += np.packbits(mask, bitorder="little").tobytes() + _pack_bits(values, _width(codes))
        return body + struct.pack("<I", zlib.crc32(body))

    @classmethod
    def from_bytes(cls, data: bytes, device: torch.device | str = "cpu") -> PackedTokens:
        """What `to_bytes` wrote; values are int32.

        Raises:
            ValueError: the bytes are truncated, damaged, of another version, or something else.
        """
        data = bytes(data)
        if len(data) < _HEADER.size + 4 or data[:4] != MAGIC:
            raise ValueError(f"data: {len(data)} bytes that do not start as packed tokens do")
        _, version, dims, clips, codes = _HEADER.unpack_from(data)
        if version != VERSION:
            raise ValueError(f"data: version {version}, this is version {VERSION}")
        if struct.unpack("<I", data[-4:])[0] != zlib.crc32(data[:-4]):
            raise ValueError("data: damaged or truncated, the checksum does not match")
        at = _HEADER.size
        if not 1 <= codes <= 2**31 or dims == 0 or len(data) - at - 4 < 4 * dims * clips:
            raise ValueError(f"data: impossible header, {clips} clips of {dims} dimensions, {codes} codes")
        sizes = struct.unpack_from(f"<{dims * clips}I", data, at)
        at += 4 * dims * clips
        grids = tuple(sizes[i * dims : (i + 1) * dims] for i in range(clips))
        tokens = [math.prod(grid) for grid in grids]
        total, width = sum(tokens), _width(codes)
        mask_bytes = (total + 7) // 8
        if len(data) - at - 4 < mask_bytes:
            raise ValueError(f"data: {total} positions do not fit into {len(data)} bytes")
        mask = np.unpackbits(
            np.frombuffer(data, np.uint8, mask_bytes, at), count=total, bitorder="little"
        ).astype(bool)
        at += mask_bytes
        kept = int(np.count_nonzero(mask))
        if len(data) - at - 4 != (kept * width + 7) // 8:
            raise ValueError(
                f"data: expected {(kept * width + 7) // 8} bytes for {kept} tokens, got {len(data) - at - 4}"
            )
        values = _unpack_bits(np.frombuffer(data, np.uint8, len(data) - at - 4, at), kept, width)
        if kept and values.max() >= codes:
            raise ValueError(f"data: a token is {values.max()}, of {codes} codes")
        parts = np.split(mask, np.cumsum(tokens)[:-1]) if clips else []
        indices = np.concatenate([np.flatnonzero(part) for part in parts]) if clips else np.zeros(0)
        ends = np.cumsum([0] + [np.count_nonzero(part) for part in parts])
        same = len(set(grids)) <= 1
        flat = torch.from_numpy(mask)
        moved = [torch.from_numpy(a.astype(np.int32)).to(device) for a in (values, indices, ends)]
        keep = (flat.view(clips, *(grids[0] if grids else dims * (0,))) if same else flat).to(device)
        return cls(moved[0], moved[1], moved[2], keep, None if same else grids)


def _width(codes: int) -> int:
    return (codes - 1).bit_length()


def _pack_bits(values: np.ndarray, width: int) -> bytes:
    bits = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _unpack_bits(data: np.ndarray, count: int, width: int) -> np.ndarray:
    bits = np.unpackbits(data, count=count * width, bitorder="little").reshape(count, width)
    return bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
