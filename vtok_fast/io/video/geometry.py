"""How a coded frame is shown: cropped, with square pixels, turned, mirrored; and how it is scaled and cut.

The order is that of a player: container crop, sample aspect ratio, display matrix (ISO/IEC 14496-12, 8.3.2).
Scaling happens once, in the coded orientation; turning and cutting are views of the scaled frame.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vtok_fast.io.video.errors import VideoError

Size = int | tuple[int, int] | None
TURN_TOLERANCE = math.radians(1)  # as ffmpeg has it: by less than a degree is not turned


def fit(height: int, width: int, size: Size) -> tuple[int, int]:
    """What a shown frame is scaled to: an int, the shorter side; (H, W), until it covers them; None, as it
    is."""
    if size is None:
        return height, width
    target = size if isinstance(size, tuple) else (size, size)
    scale = max(target[0] / height, target[1] / width)
    return max(target[0], round(height * scale)), max(target[1], round(width * scale))


@dataclass(frozen=True)
class View:
    """How the frames of one coded size are shown.

    Attributes:
        coded: (height, width) that the decoder gives, after its own cropping and that of the container.
        aspect: width of a pixel over its height.
        swap: rows become columns; then flip: (vertically, horizontally).
    """

    coded: tuple[int, int]
    aspect: Fraction = Fraction(1)
    swap: bool = False
    flip: tuple[bool, bool] = (False, False)

    @property
    def square(self) -> tuple[int, int]:
        """(height, width) in square pixels, before turning: the height stays, the width is multiplied by the
        aspect ratio and rounded."""
        return self.coded[0], max(1, math.floor(self.coded[1] * self.aspect + Fraction(1, 2)))

    @property
    def shown(self) -> tuple[int, int]:
        """(height, width) on the screen."""
        height, width = self.square
        return (width, height) if self.swap else (height, width)

    def scaled(self, size: Size) -> tuple[int, int]:
        """(height, width) to scale the coded frame to, so that the turned one has what `fit` says."""
        height, width = fit(*self.shown, size)
        return (width, height) if self.swap else (height, width)

    def turned(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (h, w, ...) as they are shown, as a view."""
        if self.swap:
            pixels = pixels.swapaxes(0, 1)
        if self.flip[0]:
            pixels = pixels[::-1]
        return pixels[:, ::-1] if self.flip[1] else pixels


def cut(pixels: np.ndarray, size: Size) -> np.ndarray:
    """The center of pixels (H, W, ...), where size is (H, W)."""
    if not isinstance(size, tuple):
        return pixels
    top, left = (pixels.shape[0] - size[0]) // 2, (pixels.shape[1] - size[1]) // 2
    return pixels[top : top + size[0], left : left + size[1]]


def turns(matrix: bytes | None) -> tuple[bool, tuple[bool, bool]]:
    """(swap, flip) of a display matrix: nine 32-bit integers (a b u, c d v, x y w), by which (p, q) is shown
    at (a p + c q, b p + d q), q downwards.

    Raises VideoError for an angle that is not a multiple of 90 degrees.
    """
    if not matrix or len(matrix) < 36:
        return False, (False, False)
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if not any((a, b, c, d)):  # nothing is said
        return False, (False, False)
    straight, swapped = min(abs(a), abs(d)), min(abs(b), abs(c))
    if max(abs(b), abs(c)) <= math.tan(TURN_TOLERANCE) * straight:
        return False, (d < 0, a < 0)
    if max(abs(a), abs(d)) <= math.tan(TURN_TOLERANCE) * swapped:
        return True, (b < 0, c < 0)
    angle = math.degrees(math.atan2(b, a))
    raise VideoError(f"is turned by {angle:.1f} degrees, which is not a multiple of 90")
