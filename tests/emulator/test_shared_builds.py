"""Processes that want the same compiled code share the work: each file is made once."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import emulator

pytestmark = pytest.mark.volatile
TESTS = Path(__file__).resolve().parents[1]
COMPILER = """#!/bin/sh
echo "$1" >> "$(dirname "$0")/log"
while [ "$#" -gt 1 ]; do shift; done
sleep 0.1
echo made > "$1"
"""
EDITED = """#!/bin/sh
while [ "$#" -gt 1 ]; do shift; done
if [ $(wc -l < {source}) -lt {edits} ]; then
    echo "// an edit" >> {source}
    if [ {fails} = 1 ]; then exit 1; fi
fi
cp {source} "$1"
"""
BUILD = """
import sys
from pathlib import Path
from support import emulator
emulator.CACHE = Path(sys.argv[1])
emulator._make({emulator.CACHE / f"{i}.o": [emulator.CACHE / "compiler", i] for i in range(6)})
print(all((emulator.CACHE / f"{i}.o").read_text() == "made\\n" for i in range(6)))
"""


def test_each_file_is_made_once(tmp_path):
    (tmp_path / "compiler").write_text(COMPILER)
    (tmp_path / "compiler").chmod(0o755)
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=TESTS, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0] for process in processes] == ["True\n"] * 3
    assert sorted((tmp_path / "log").read_text().split()) == [*"012345"]


def test_a_file_that_another_process_renames_is_no_error(tmp_path, monkeypatch):
    """It is listed, and gone when its age is asked for."""
    monkeypatch.setattr(emulator, "CACHE", tmp_path)
    (tmp_path / "made.o").touch()
    (tmp_path / "other.123").symlink_to(tmp_path / "gone")
    emulator._make({tmp_path / "made.o": ()})


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("edits", [2, 99])
def test_what_is_compiled_during_an_edit_is_not_kept(tmp_path, monkeypatch, edits, fails):
    """Its name is the hash of the text before, and an error may be of half an edit."""
    source, compiler, cache = (tmp_path / name for name in ("source.cu", "compiler", "cache"))
    source.touch()
    compiler.write_text(EDITED.format(source=source, edits=edits, fails=fails))
    compiler.chmod(0o755)
    monkeypatch.setattr(emulator, "CACHE", cache)
    monkeypatch.setattr(emulator, "_compiler", lambda: str(compiler))
    monkeypatch.setattr(emulator, "Library", lambda path, exports: path)
    if edits == 99:
        with pytest.raises(emulator.SourcesChanged, match=r"source\.cu was edited"):
            emulator.build(source, exports={})
        assert not [*cache.glob("*.o"), *cache.glob("*.so")]
    else:
        assert emulator.build(source, exports={}).read_text() == source.read_text()
        assert {path.read_text() for path in cache.glob("*.o")} == {source.read_text()}
