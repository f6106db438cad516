"""What reading a video can raise, and what it needs to be installed."""

from __future__ import annotations

from typing import Any


class VideoError(ValueError):
    """A file that cannot be read as a video; the message names it and says why."""


def pyav() -> Any:
    """The module `av`. Raises ImportError, saying how to install it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            f'reading and writing videos needs PyAV ({error}): pip install "vtok-fast[demo]"'
        ) from error
    return av
