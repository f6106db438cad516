"""A folder in vtok_fast/ops, with its two modules elsewhere, is all that an op needs to be found: the op of
docs/extending.md, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vtok_fast
from vtok_fast.bench.sections import section
from vtok_fast.dispatch import backends
from vtok_fast.ops import FOLDERS

ROOT = Path(__file__).resolve().parents[1]
NAME = "halve_and_add"

CHECKS = f"""
from vtok_fast.commands.checks.compare import closely, random
from vtok_fast.ops.{NAME} import fast_{NAME}

CASES = {{"small": ((random(3, 4), random(3, 4, seed=1)), {{}})}}
CHECKS = {{"{NAME}": lambda op, backend: closely(op, backend, fast_{NAME}, CASES)}}
"""

FOUND = f"""
import torch
import vtok_fast
from vtok_fast.bench import sections
from vtok_fast.commands import check, info

assert hasattr(torch.ops.vtok_fast, "{NAME}")
assert set(vtok_fast.available_backends()["{NAME}"]) == {{"cpu", "reference"}}
assert info.BACKENDS["{NAME}"] == ("cpu", "reference")
assert "{NAME}" in sections.OPS and sections.section("{NAME}").PEERS == "none"
outcomes = list(check.checks()["{NAME}"]("{NAME}", "reference"))
assert len(outcomes) == 3 and all(outcome.ok for outcome in outcomes)
print("found")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package's sources with one op more."""
    folder = tmp_path_factory.mktemp("package")
    copy = folder / "vtok_fast"
    shutil.copytree(
        ROOT / "vtok_fast", copy, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")
    )
    page = (ROOT / "docs" / "extending.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)[:3]
    code, registered, _ = "\n".join(blocks).partition("torch.library.register_autograd(")
    assert registered and f'backends.register(  # op.py\n    "{NAME}"' in code
    (copy / "ops" / NAME).mkdir()
    (copy / "ops" / NAME / "__init__.py").write_text(code)
    (copy / "commands" / "checks" / f"{NAME}.py").write_text(CHECKS)
    (copy / "bench" / "cases" / f"{NAME}.py").write_text('PEERS = "none"\n')
    return folder


def run(package, *words, **variables):
    environment = os.environ | {"PYTHONPATH": str(package)} | variables
    done = subprocess.run(
        [sys.executable, *words], env=environment, cwd=package, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_op_is_found(package):
    assert run(package, "-c", FOUND) == "found\n"


def test_the_help_names_it_and_does_not_wait_for_torch(package, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('blocked')\n")
    path = f"{tmp_path}{os.pathsep}{package}"
    said = run(package, "-m", "vtok_fast.cli", "bench", "--help", PYTHONPATH=path, COLUMNS="300")
    assert NAME in said


@pytest.mark.parametrize("folder", FOLDERS)
def test_an_op_is_complete(folder):
    """Its public functions are exported, and it has a benchmark."""
    public = __import__(f"vtok_fast.ops.{folder}", fromlist=["__all__"])
    functions = {name for name in public.__all__ if callable(getattr(public, name))}
    internal = {"check_levels", "threshold_table", "token_rates"}
    assert functions - internal <= set(vtok_fast.__all__), functions - internal - set(vtok_fast.__all__)
    assert section(folder).PEERS


def test_the_folders_hold_every_registered_op():
    sources = {folder: list((ROOT / "vtok_fast" / "ops" / folder).glob("*.py")) for folder in FOLDERS}
    for op in backends.backends_of_ops():
        assert any(f'"{op}"' in file.read_text() for files in sources.values() for file in files), op
