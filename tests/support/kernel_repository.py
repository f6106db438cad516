"""scripts/hub.py, and a repository that it wrote."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vtok_fast.dispatch import native

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts" / "hub.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)


def write_repository(folder: Path) -> tuple[Path, dict[str, str]]:
    """The portable variants and the one of this torch, with the native module where there is one: where, and
    the id of each."""
    natives = [Path(native.lib().__file__)] if native.lib() else []
    return folder, hub.write(folder, [*hub.PORTABLE, hub.variant_here()], natives)
