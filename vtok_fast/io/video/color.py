"""A decoded frame as RGB, by what its tags say.

Where nothing is tagged, the customary guess holds: the matrix of BT.601 below 720 lines and of BT.709 from
there on, limited range (full range of gray, RGB and JPEG formats). libswscale converts, with flags by which
it is unbiased: without FULL_CHR_H_INT and ACCURATE_RND white comes out as 253.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from vtok_fast.io.video import hdr
from vtok_fast.io.video.errors import VideoError, pyav

HD_LINES = 720
MATRICES = {1: "BT.709", 4: "FCC", 5: "BT.601", 6: "BT.601", 7: "SMPTE 240M", 8: "YCgCo", 9: "BT.2020"}
REFUSED = {10: "BT.2020 constant luminance", 11: "SMPTE ST 2085", 12: "derived from the primaries",
           13: "constant luminance derived from the primaries", 14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-Re",
           17: "YCgCo-Ro"}  # fmt: skip
REFUSED_TRANSFER = {9: "logarithmic (100:1)", 10: "logarithmic (316:1)"}
LIMITED, FULL = 1, 2


def guess(frame: Any) -> tuple[int, int]:
    """(matrix, range) of a frame, as tagged or by the customary guess; numbers of ITU-T H.273, and 1 for
    limited, 2 for full range."""
    name = frame.format.name
    if frame.format.is_rgb or frame.format.has_palette:
        return 0, FULL
    matrix = int(frame.colorspace)
    if matrix in (0, 2, 3):
        matrix = 1 if frame.height >= HD_LINES else 5
    spread = int(frame.color_range)
    if spread not in (LIMITED, FULL):
        spread = FULL if is_gray(frame) or name.startswith("yuvj") else LIMITED
    return matrix, spread


def check(frame: Any, hdr_mode: str) -> None:
    """Raises VideoError, without the file's name, for colors that cannot be converted, or must not."""
    matrix, transfer, primaries = int(frame.colorspace), int(frame.color_trc), int(frame.color_primaries)
    if matrix in REFUSED and not frame.format.is_rgb:
        raise VideoError(f"has the matrix {REFUSED[matrix]}, which is not supported")
    if transfer in REFUSED_TRANSFER:
        raise VideoError(f"has a {REFUSED_TRANSFER[transfer]} transfer, which is not supported")
    if primaries == 10:
        raise VideoError("has primaries of XYZ (SMPTE ST 428), which are not supported")
    if hdr_mode == "error" and transfer in (hdr.PQ, hdr.HLG):
        name = "PQ (SMPTE ST 2084)" if transfer == hdr.PQ else "HLG (ARIB STD-B67)"
        raise VideoError(f"is HDR, {name}, and hdr='error' (--hdr error) refuses it")


def depth(frame: Any) -> int:
    """Bits of a component, at most 16."""
    return min(16, max((component.bits for component in frame.format.components), default=8))


def has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def is_gray(frame: Any) -> bool:
    return frame.format.name.startswith(("gray", "ya8", "ya16", "monow", "monob"))


def rgb(frame: Any, height: int, width: int, background: tuple[int, int, int]) -> list[np.ndarray]:
    """A frame scaled to height and width as R, G and B, each (height, width) uint8.

    Where it has transparency, it is laid over background before it is scaled, so that colors that nobody
    sees do not show at edges.
    """
    if has_alpha(frame):
        frame = _opaque(frame, background)
    return _convert(frame, height, width)


def _convert(frame: Any, height: int, width: int) -> list[np.ndarray]:
    matrix, spread = guess(frame)
    transfer, primaries = int(frame.color_trc), int(frame.color_primaries)
    if primaries in (0, 2, 3) and transfer in (hdr.PQ, hdr.HLG):
        primaries = 9
    light = transfer in (hdr.PQ, hdr.HLG, *hdr.LIGHT) or primaries in hdr.WIDE
    bits = depth(frame)
    if is_gray(frame):
        codes = _gray(frame, height, width, spread)
    elif matrix == 8:
        codes = _ycgco(frame, height, width, spread)
    elif not light and (bits <= 8 or (spread == LIMITED and matrix)):
        return _planes(_reformat(frame, height, width, "gbrp", matrix, spread), np.uint8)
    else:
        deep = _reformat(frame, height, width, "gbrp16le", matrix, spread)
        codes = np.stack([plane.astype(np.int32) for plane in _planes(deep, np.uint16)])
        white = _white(matrix, spread, bits)
        if white != 65535 or not light:
            codes = torch.from_numpy(codes).mul(65535 / white).round_().clamp_(0, 65535).int().numpy()
    if light:
        return list(hdr.to_sdr(torch.from_numpy(codes), transfer, primaries).numpy())
    return list(((codes * 255 + 32767) // 65535).astype(np.uint8))


def _white(matrix: int, spread: int, bits: int) -> int:
    """The code that libswscale gives white in 16 bits: it shifts instead of multiplying."""
    return 65283 if matrix and spread == LIMITED else min(65535, 65536 - (1 << (16 - bits)))


def _reformat(frame: Any, height: int, width: int, form: str, matrix: int, spread: int) -> Any:
    av = pyav()
    kinds = av.video.reformatter.Interpolation
    if matrix and int(frame.colorspace) != matrix:
        frame.colorspace = matrix
    if not frame.format.is_rgb and int(frame.color_range) != spread:
        frame.color_range = spread
    # AREA averages the pixels that fall together, so that shrinking does not alias; enlarging it is bilinear.
    flags = kinds.AREA | kinds.FULL_CHR_H_INT | kinds.ACCURATE_RND
    return frame.reformat(width=width, height=height, format=form, interpolation=flags, threads=1)


def _planes(frame: Any, kind: Any) -> list[np.ndarray]:
    """R, G and B of a planar frame, as views."""
    green, blue, red = (_lines(plane, kind, frame.height, frame.width) for plane in frame.planes[:3])
    return [red, green, blue]


def _gray(frame: Any, height: int, width: int, spread: int) -> np.ndarray:
    """RGB codes in 16 bits of a gray frame."""
    bits = depth(frame)
    form = "gray16le" if bits == 16 else f"gray{bits}le" if bits > 8 else "gray"
    kinds = pyav().video.reformatter.Interpolation
    frame.color_range = spread
    plane = frame.reformat(
        width=width, height=height, format=form, dst_color_range=spread, interpolation=kinds.AREA
    ).planes[0]
    values = _lines(plane, np.uint16 if bits > 8 else np.uint8, height, width).astype(np.float32)
    step = 1 << (max(bits, 8) - 8)
    black, white = (16 * step, 235 * step) if spread == LIMITED else (0, 256 * step - 1)
    codes = ((values - black) / (white - black)).clip(0, 1) * 65535 + 0.5
    return np.broadcast_to(codes.astype(np.int32), (3, height, width))


def _lines(plane: Any, kind: Any, height: int, width: int) -> np.ndarray:
    """A plane's values, as a view."""
    return np.frombuffer(plane, kind).reshape(-1, plane.line_size // np.dtype(kind).itemsize)[:height, :width]


def _ycgco(frame: Any, height: int, width: int, spread: int) -> np.ndarray:
    """RGB codes in 16 bits of YCgCo (ITU-T H.273, matrix 8)."""
    bits = depth(frame)
    deep = _reformat(frame, height, width, "yuv444p16le", 5, spread)  # libswscale would refuse the true tag
    frame.colorspace = 8
    y, cg, co = (_lines(plane, np.uint16, height, width) / (1 << (16 - bits)) for plane in deep.planes)
    step = 1 << (bits - 8)
    if spread == LIMITED:
        y, cg, co = ((y - 16 * step) / (219 * step), *((c - 128 * step) / (224 * step) for c in (cg, co)))
    else:
        y, cg, co = (y / (256 * step - 1), *((c - 128 * step) / (256 * step - 1) for c in (cg, co)))
    colors = np.stack((y - cg + co, y + cg, y - cg - co))
    return (colors.clip(0, 1) * 65535 + 0.5).astype(np.int32)


def _opaque(frame: Any, background: tuple[int, int, int]) -> Any:
    """A frame with transparency (straight, not multiplied in) over a color, as RGB of 8 bits."""
    av = pyav()
    height, width = frame.height, frame.width
    if frame.format.has_palette:
        rgba = frame.reformat(format="rgba").to_ndarray()
        colors, alpha = rgba[..., :3], rgba[..., 3]
    else:
        colors = np.stack(_convert(frame, height, width), -1)
        if depth(frame) > 8:
            alpha = frame.reformat(format="rgba64le").to_ndarray()[..., 3]
        else:
            alpha = frame.reformat(format="rgba").to_ndarray()[..., 3]
    share = alpha[..., None].astype(np.float32) / (255 if alpha.dtype == np.uint8 else 65535)
    back = np.array(background, np.float32)
    mixed = back + (colors - back) * share
    return av.VideoFrame.from_ndarray((mixed + 0.5).astype(np.uint8), format="rgb24")
