"""The documentation says what is: every Python block runs, every command is one, every link leads somewhere,
every file that is named exists, every table is what the results say."""

import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

from vtok_fast import cli
from vtok_fast.dispatch import backends

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *(p for p in ROOT.glob("*.md"))])
ids = [str(p.relative_to(ROOT)) for p in PAGES]
BLOCK = re.compile(r"^(?P<before>[^\n]*)\n+```python\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```sh\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:benchmarks|csrc|docs|examples|kernels|scripts|tests|vtok_fast)/[\w./-]+\.\w+)`")
# Blocks with a released checkpoint, a user's own layer, or the like: a comment before them says so.
NOT_RUN = "<!-- not run"


def blocks(page):
    """The code of a page with its lines where the page has them, so that a traceback points there."""
    text = page.read_text()
    for match in BLOCK.finditer("\n" + text):
        if NOT_RUN not in match["before"]:
            yield "\n" * (text[: max(match.start("code") - 1, 0)].count("\n")) + match["code"]


RUN = [p for p in PAGES if any(blocks(p))]


def paced(page):
    """The gallery draws for half a minute."""
    slow = [pytest.mark.slow] if page.name == "gallery.md" else []
    return pytest.param(page, marks=slow, id=str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", map(paced, RUN))
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(backends, "_ops", dict(backends._ops))  # a page registers an op of its own
    monkeypatch.setattr(backends, "_fallbacks", {})
    torch.manual_seed(0)
    names = {"__name__": "docs"}
    for code in blocks(page):  # one after the other, as a reader would paste them
        exec(compile(code, page, "exec"), names)


def test_there_is_something_to_run():
    assert ROOT / "README.md" in RUN and len(RUN) >= 15 and sum(len(list(blocks(p))) for p in RUN) >= 27


def commands(page):
    """The lines of a page's shell blocks, each as words, without comments, settings in front, and what
    follows a pipe."""
    for match in SHELL.finditer(page.read_text()):
        for line in match["code"].replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            yield list(itertools.takewhile(lambda word: word not in ("|", "&&", ";", ">"), words))


def test_the_commands_of_the_pages_exist():
    """`vtok-fast ...` has those options, `make ...` that target, `python ...` that file; nothing is run."""
    program, seen = typer.main.get_command(cli.app), 0
    groups = [program]
    for group in groups:
        groups += [command for command in group.commands.values() if hasattr(command, "commands")]
        for command in group.commands.values():
            if not hasattr(command, "commands"):
                command.callback = lambda **options: None
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        for words in commands(page):
            if words[:1] == ["vtok-fast"]:
                seen += 1
                try:
                    program.main(words[1:], prog_name="vtok-fast", standalone_mode=False)
                except Exception as error:
                    raise AssertionError(f"{page.name}: {' '.join(words)}: {error}") from error
            elif words[:1] == ["make"]:
                unknown = {word for word in words[1:] if "=" not in word} - targets
                assert not unknown, f"{page.name}: make {unknown}; there is {sorted(targets)}"
            elif words[:1] == ["python"] and words[1:2] != ["-m"]:
                assert (ROOT / words[1]).exists(), f"{page.name}: {' '.join(words)}"
    assert seen >= 10
    with pytest.raises(Exception, match="No such option"):
        program.main(["bench", "--shapes", "1,2"], standalone_mode=False)


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"`", "", h)).strip().lower().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    for link in LINK.findall(text):
        if re.match(r"https?://|mailto:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name} links to {link}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page.name} links to {link}; there is {sorted(anchors(file))}"
    for path in PATH.findall(text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_no_page_is_lost():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation, f"{page} is not in mkdocs.yml"


def test_tables_come_from_results():
    docs = runpy.run_path(str(ROOT / "scripts" / "docs.py"))
    page = (ROOT / "docs" / "ops" / "fsq.md").read_text()
    for path in PAGES:
        assert docs["filled"](path.read_text()) == path.read_text(), (
            f"{path.name}: run python scripts/docs.py"
        )
    spoiled = page.replace("| times eager |", "| times better than anything |")
    assert spoiled != page and "better than anything" not in docs["filled"](spoiled)


@pytest.mark.slow
def test_pictures_are_drawn(tmp_path):
    docs = runpy.run_path(str(ROOT / "scripts" / "docs.py"))
    for name, draw in docs["PICTURES"].items():
        draw(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocstrings")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "site" / "ops" / "fsq" / "index.html").is_file()
    assert "The first version." in (tmp_path / "site" / "changelog" / "index.html").read_text()
