"""What `vtok-fast bench` and `vtok-fast bench compare` print."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtok_fast.cli import app

RESULTS = str(next((Path(__file__).parents[2] / "benchmarks" / "results").glob("*.json")))


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        app(["bench", *arguments])
    assert not end.value.code
    return capsys.readouterr().out


def test_the_help_shows_the_options_of_a_run(capsys):
    text = said(capsys, "--help")
    assert all(word in text for word in ("compare", "--op", "--shape", "--plot", "--dry-run"))


def test_one_case_is_one_case(capsys):
    assert said(capsys, "--op", "fsq", "--shape", "1,6,2,8,8", "--dry-run").splitlines()[-1] == "1 case"


def test_compare_prints_no_empty_table(capsys):
    text = said(capsys, "compare", RESULTS, RESULTS)
    assert "cases in both, 0 slower" in text and "section" not in text
    assert "section" in said(capsys, "compare", "--all", RESULTS, RESULTS)
