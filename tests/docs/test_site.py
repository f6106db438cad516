"""The check of the site finds what it should; the gallery has the pictures that its page names."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
site = runpy.run_path(str(ROOT / "scripts" / "check_site.py"))
PAGE = "<!doctype html><title>t</title><body style='width:900px'><article>{}</article>"


def _site(folder: Path, body: str, words: str = "") -> Path:
    (folder / "search").mkdir(parents=True)
    index = {"docs": [{"title": "t", "text": words}]}
    (folder / "search" / "search_index.json").write_text(json.dumps(index))
    (folder / "index.html").write_text(PAGE.format(body))
    return folder


FAULTS = {
    "a picture that is missing": ("<img src='none.png'>", "/: picture none.png"),
    "a link that leads nowhere": ("<a href='/none/'>x</a>", "/: link /none/"),
    "an anchor that is missing": ("<a href='#none'>x</a>", "/: link #none"),
    "an error in a script": ("<script>throw new Error('planted')</script>", "planted"),
    "another host": ("<img src='http://example.invalid/x.png'>", "request to http://example.invalid/x.png"),
    "code that does not fit": (
        "<pre style='width:300px;overflow:auto'><code style='display:block;overflow:auto'>"
        + "x" * 200
        + "</code></pre>",
        "/: code wider than its column: xxx",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(site["browser"]() is None, reason="there is no Chromium")
@pytest.mark.parametrize("name", FAULTS)
def test_the_browser_finds(name, tmp_path):
    body, said = FAULTS[name]
    faults = site["look"](_site(tmp_path / "site", body), None, site["browser"]())
    assert any(said in fault for fault in faults), faults


@pytest.mark.slow
@pytest.mark.skipif(site["browser"]() is None, reason="there is no Chromium")
def test_the_browser_finds_nothing_in_a_sound_page(tmp_path):
    folder = _site(
        tmp_path / "site", "<a href='/'>home</a> <a href='#here' id='here'>x</a><pre><code>x</code></pre>"
    )
    assert site["look"](folder, None, site["browser"]()) == []


def test_without_a_browser_that_is_said(tmp_path, monkeypatch, capsys):
    folder = _site(tmp_path / "site", "", " ".join(site["models"]()))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert site["main"]([str(folder)]) == 0 and "was left out" in capsys.readouterr().out


def test_models_that_search_does_not_find_are_named(tmp_path):
    names = site["models"]()
    assert {"vidtok", "AutoencoderKLWan", "fsq_causal_488_32768"} <= set(names)
    folder = _site(tmp_path / "site", "", " ".join(name for name in names if name != "AutoencoderKLWan"))
    assert site["unfound"](folder, names) == ["not found by search: AutoencoderKLWan"]


def test_the_gallery_has_a_picture_for_each_that_it_names():
    gallery = runpy.run_path(str(ROOT / "scripts" / "gallery.py"))
    page = (ROOT / "docs" / "gallery.md").read_text()
    code = "\n".join(gallery["blocks"](page))
    for path in (ROOT / "docs" / "gallery").iterdir():
        assert f"(gallery/{path.name})" in page
        assert path.name in code or path.name == "roofline.png"


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    from vtok_fast import Scope
    from vtok_fast.commands import pictures

    video = torch.rand(1, 3, 5, 16, 24) * 2 - 1
    other = video.clone()
    other[0, 1, 2, 3, 4] += 0.25
    assert pictures.error_map(tmp_path / "a.png", other, video) == pytest.approx(4, rel=1e-5)
    pictures.error_map(tmp_path / "b.svg", video, video)
    keep = torch.rand(1, 2, 4, 6) > 0.5
    pictures.token_map(tmp_path / "c.png", video, keep, keep.float())
    assert pictures.schedule(tmp_path / "d.png", Scope.per_frame(5, 3)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.svg", "c.png", "d.png"]
    with pytest.raises(ValueError, match="expected one shape"):
        pictures.error_map(tmp_path / "e.png", video, video[:, :, :4])
