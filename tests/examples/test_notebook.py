"""The notebooks of examples/ run from the first cell to the last, and are kept without results."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib").use("agg")
NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))


def cells(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path), 1):
        exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)
    assert names["report"].ok and (tmp_path / "scope.png").is_file() and (tmp_path / "clip.tokens").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_no_results_are_committed(path):
    assert len(cells(path)) > 3
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells(path))
