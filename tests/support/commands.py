"""The command line in this process, which has torch already."""

from __future__ import annotations

import sys
from pathlib import Path

from vtok_fast import cli


def run_here(*options: str | Path) -> int:
    """Runs `vtok-fast` with these options. Returns the exit code."""
    before = sys.argv
    sys.argv = ["vtok-fast", *map(str, options)]
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    finally:
        sys.argv = before
    return 0
