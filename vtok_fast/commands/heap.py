"""The memory that a command has freed stays in the process, for the next tensor of its size."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let glibc serve every size from its heap, and not give back what is freed there. Returns whether it
    does; other C libraries are left alone.

    By default each tensor above 32 MB is mapped and unmapped on its own, so that the system makes and clears
    its pages anew for every layer of every window. It holds for the whole process: for commands, not for the
    package. The peak grows by what lies between blocks that are in use, not with the length of the video.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc; Windows
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
