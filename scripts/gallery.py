"""Draws the gallery: `python scripts/gallery.py` runs the Python of docs/gallery.md in a folder, and keeps
the pictures that it writes in docs/gallery/; the roofline is of the committed results."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = ROOT / "docs" / "gallery.md", ROOT / "docs" / "gallery"
MEASURED = ROOT / "benchmarks" / "results" / "amd-epyc-family25-model17-2cores-avx512.json"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def roofline(path: Path) -> None:
    """Attention and packing, of which the run has ceilings."""
    from vtok_fast.bench import picture, report

    results = report.load(MEASURED)
    kept = {name: results["sections"][name] for name in ("scope_attention", "token_packing")}
    picture.draw(results | {"sections": kept}, path)


def main(folder: Path = PICTURES) -> int:
    wanted = re.findall(r"\(gallery/([\w.]+)\)", PAGE.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            names: dict = {"__name__": "gallery"}
            for code in blocks(PAGE.read_text()):
                exec(compile(code, str(PAGE), "exec"), names)
            roofline(Path("roofline.png"))
        finally:
            os.chdir(before)
        for name in wanted:
            shutil.copy(Path(scratch) / name, folder / name)
            print(folder / name)
    return 0


if __name__ == "__main__":
    import matplotlib

    matplotlib.use("Agg")
    sys.exit(main())
