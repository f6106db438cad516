"""The command line: what it prints, its exit codes, and that bad input is one line."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("matplotlib")

from support.commands import run_here  # noqa: E402

import vtok_fast
from vtok_fast.bench import process_memory
from vtok_fast.commands import demo as demo_module
from vtok_fast.installation import doctor
from vtok_fast.io.token_windows import TokenWindows
from vtok_fast.io.tokens import Tokens
from vtok_fast.io.video import read_video, write_video
from vtok_fast.models import VidTok, VTok
from vtok_fast.models.vidtok.config import CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def run(*options: str | Path, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "vtok_fast.cli", *map(str, options)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"} | environment,
    )


def one_line(code: int, said: str) -> str:
    assert code == 1
    assert "Traceback" not in said and len(said.strip().splitlines()) == 1, said
    return said


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Twenty frames of a gradient that moves."""
    path = tmp_path_factory.mktemp("clip") / "waves.mp4"
    y, x = torch.meshgrid(torch.linspace(-1, 1, 48), torch.linspace(-1, 1, 64), indexing="ij")
    frames = [torch.stack((torch.sin(3 * x + t / 4), torch.cos(2 * y - t / 6), x * y)) for t in range(20)]
    write_video(path, torch.stack(frames, 1), fps=10)
    return path


@pytest.fixture(scope="module")
def demo(clip, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "demo"
    return run(
        "demo", "--video", clip, "--output", output, "--size", 32, "--rounds", 1, "--threads", 1, "--json"
    ), output


def test_info(capsys):
    assert run_here("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert set(facts["ops"]) >= {"causal_conv3d", "norm_act", "fsq"}
    assert all(backends["reference"] is None for backends in facts["ops"].values())
    assert run_here("info") == 0
    assert "causal_conv3d" in capsys.readouterr().out


def test_demo_writes_a_folder(demo, clip):
    result, output = demo
    assert result.returncode == 0, result.stderr
    assert {path.name for path in output.iterdir()} == {
        "tokens.safetensors",
        "reconstruction.mp4",
        "demo.png",
        "demo.json",
    }
    assert json.loads(result.stdout) == json.loads((output / "demo.json").read_text())
    tokens = Tokens.load(output / "tokens.safetensors")
    assert tokens.video_shape == (17, 32, 32) and tuple(tokens.indices.shape) == (1, 5, 8, 8)
    back = read_video(output / "reconstruction.mp4")
    assert back.video.shape == (3, 17, 32, 32) and back.fps == 10
    assert (output / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_demo_measures(demo, clip):
    facts = json.loads(demo[0].stdout)
    assert facts["trained"] and facts["shape"] == [1, 3, 17, 32, 32]
    assert facts["swapped"] > 0 or facts["skipped"] > 0
    assert facts["parity"]["ok"] and facts["parity"]["tokens"]["total"] == 5 * 8 * 8
    for variant in ("eager", "fast"):
        part = facts["seconds"][variant]
        assert 0 < part["encode"] < part["total"] and 0 < part["decode"] < part["total"]
        assert facts["peak_bytes"] is None or facts["peak_bytes"][variant] > 0
    assert facts["compression"]["ratio"] == pytest.approx(3 * 17 * 32 * 32 * 8 / (320 * 18))
    # The tokens that it wrote hold the picture: decoded, they are the reconstruction.
    model = VidTok.from_checkpoint(
        ROOT / "vtok_fast" / "models" / "weights" / "vidtok_tiny.safetensors"
    ).eval()
    video = model.decode(Tokens.load(demo[1] / "tokens.safetensors"))[0]
    source = read_video(clip, size=(32, 32), frames=17).video
    assert 10 * torch.log10(4 / (video.clamp(-1, 1) - source).square().mean()) == pytest.approx(
        facts["psnr_db"], abs=0.01
    )


def test_demo_says_so_without_weights(clip, tmp_path, monkeypatch):
    monkeypatch.setitem(CONFIGS, "released", CONFIGS["tiny"] | {"ch": 4})
    # Measured in the demo above
    monkeypatch.setattr(process_memory, "measure", lambda variant, shape, **_: {"peak": 1})
    said = []
    result = demo_module.run(
        demo_module.Options(clip, "released", output=tmp_path / "demo", size=16, rounds=1), said.append
    )
    assert result["trained"] is False
    assert any("RANDOM WEIGHTS" in line for line in said if isinstance(line, str))


def test_demo_takes_a_checkpoint(tmp_path):
    saved = VidTok("tiny")
    saved.save(tmp_path / "mine.safetensors")
    model, trained = demo_module.load_model(demo_module.Options(checkpoint=tmp_path / "mine.safetensors"))
    assert trained and all(
        torch.equal(value, saved.state_dict()[key]) for key, value in model.state_dict().items()
    )


def test_demo_on_a_short_clip(clip):
    options = demo_module.Options(clip, size=16, start=13)
    clips, _ = demo_module.load_clips(options, demo_module.load_model(options)[0], few=False)
    assert clips.shape == (1, 3, 5, 16, 16)  # 7 frames are left, 1 + 4 come back complete


def test_demo_takes_several_chunks(clip):
    options = demo_module.Options(clip, size=16, chunks=3, start=0)
    clips, fps = demo_module.load_clips(
        options, VidTok(**CONFIGS["fsq_noncausal_488_262144"] | {"ch": 4}), few=False
    )
    assert (clips.shape, fps) == ((1, 3, 16, 16, 16), 10)  # 20 frames hold one chunk of 16
    assert torch.equal(clips[0], read_video(clip, size=(16, 16), frames=16).video)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--video", "nowhere.mp4"), "no video at nowhere.mp4"),
        (("--config", "huge"), "config='huge': expected one of fsq_causal_488_4096, "),
        (("--checkpoint", "none.ckpt"), "no checkpoint at none.ckpt"),
        (("--checkpoint", "noise.ckpt"), "noise.ckpt is damaged, or holds Python objects besides tensors"),
        (("--chunks", "0"), "chunks=0"),
        (("--size", "22"), "multiples of 4"),
    ],
)
def test_demo_with_bad_input(clip, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noise.ckpt").write_bytes(random.Random(0).randbytes(3000))
    given = () if "--video" in options else ("--video", clip)
    assert message in one_line(run_here("demo", *given, *options), capsys.readouterr().err)
    assert not (tmp_path / "demo").exists() or not list((tmp_path / "demo").iterdir())


def test_demo_on_a_file_that_is_no_video(tmp_path):
    (tmp_path / "notes.mp4").write_text("no video")
    result = run("demo", "--video", "notes.mp4", cwd=tmp_path)
    assert "notes.mp4 cannot be read as a video" in one_line(result.returncode, result.stderr)


def test_check(capsys):
    code = run_here("check", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert code == 0, [outcome for outcome in facts["outcomes"] if not outcome["ok"]]
    assert {outcome["op"] for outcome in facts["outcomes"]} >= {"causal_conv3d", "norm_act", "fsq", "VidTok"}
    measured = [outcome for outcome in facts["outcomes"] if outcome["error"] is not None]
    assert measured and all(outcome["error"] <= outcome["bound"] for outcome in measured)


def test_check_fails_where_a_kernel_is_wrong(monkeypatch, capsys):
    from vtok_fast.commands import check
    from vtok_fast.commands.checks import norm_act as norms

    def wrong(*args, backend=None, **options):
        return norm_act(*args, backend="reference", **options) * (1.0 if backend == "reference" else 1.001)

    norm_act = norms.norm_act
    monkeypatch.setattr(norms, "norm_act", wrong)
    monkeypatch.setattr(check, "available_backends", lambda: {"norm_act": {"cpu": None}})
    monkeypatch.setattr(check, "_vidtok", lambda: iter(()))
    assert run_here("check", "--json") == 1
    assert any(not outcome["ok"] for outcome in json.loads(capsys.readouterr().out)["outcomes"])


def test_bench_passes_its_options_on(tmp_path):
    result = run("bench", "no_such_op", "--quick", cwd=tmp_path)
    assert result.returncode != 0 and "no_such_op" in result.stderr


def test_doctor(capsys):
    code = run_here("doctor", "--json")
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["torch"]["level"] == "ok" and torch.__version__ in findings["torch"]["text"]
    assert code == int(any(finding["level"] == "bad" for finding in findings.values()))


def blocked(folder: Path, module: str) -> dict[str, str]:
    """An environment in which a module cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules[{module!r}] = None\n")
    return os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.parametrize(
    "how", [[doctor.__file__], ["-m", "vtok_fast.cli", "doctor"]], ids=["file", "command"]
)
def test_doctor_without_torch(tmp_path, how):
    result = subprocess.run(
        [sys.executable, *how], capture_output=True, text=True, env=blocked(tmp_path, "torch")
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "bad   torch: cannot be imported" in result.stdout and "-> " in result.stdout


def test_the_package_without_torch_says_so(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", "import vtok_fast; vtok_fast.accelerate"],
        capture_output=True,
        text=True,
        env=blocked(tmp_path, "torch"),
    )
    assert "vtok_fast.accelerate needs torch, which cannot be imported" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "options", [["--version"], ["--help"], ["tokenize", "--help"], ["bench", "--help"], ["encode"]]
)
def test_what_needs_no_torch_does_not_wait_for_it(options):
    command = [sys.executable, "-X", "importtime", "-m", "vtok_fast.cli", *options]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if "|" in line}
    assert {"typer", "vtok_fast"} <= imported and "torch" not in imported
    said = result.stdout + result.stderr
    assert (
        vtok_fast.__version__ if options == ["--version"] else "Usage:"
    ) in said and "Traceback" not in said


@pytest.mark.parametrize("first", ["", "import torch; "])
@pytest.mark.parametrize(
    "use",
    [
        "assert set(vtok_fast.__all__) <= set(dir(vtok_fast))",
        "assert vtok_fast.Scope and vtok_fast.parity and vtok_fast.nn.FSQ",
        "from vtok_fast import causal_conv3d, models",
        "from vtok_fast.io.tokens import Tokens; assert Tokens is vtok_fast.Tokens",
        "assert len(vtok_fast.available_backends()) > 8",
    ],
)
def test_names_are_there_whether_torch_was_imported_before_or_not(first, use):
    code = f"{first}import vtok_fast; {use}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["torch, vtok_fast", "vtok_fast, torch"])
def test_the_ops_are_registered_by_the_import(first):
    code = f"import {first}; torch.ops.vtok_fast.causal_conv3d, torch.ops.vtok_fast.norm_act_backward"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="accelerated_model"):
        vtok_fast.accelerated_model  # noqa: B018


def test_doctor_without_the_native_module(tmp_path):
    result = subprocess.run(
        [sys.executable, doctor.__file__],
        capture_output=True,
        text=True,
        env=blocked(tmp_path, "vtok_fast._C"),
    )
    assert result.returncode == 1
    assert (
        "bad   native module: the native module is not built" in result.stdout
        and "pip install ." in result.stdout
    )


@pytest.mark.parametrize(
    ("openmp", "level"),
    [([], "ok"), (["/a/libgomp.so.1"], "ok"), (["/a/libgomp.so.1", "/b/libiomp5.so"], "hint")],
)
def test_doctor_counts_openmp_runtimes(openmp, level):
    assert doctor._openmp({"openmp": openmp}).level == level


@pytest.mark.parametrize(
    ("version", "cuda", "level"),
    [
        ("2.5.1+cpu", False, "bad"),
        ("2.6.0", False, "ok"),
        ("2.9.1", True, "ok"),
        ("2.9.1", False, "ok"),
        ("2.13.0+cpu", False, "ok"),
    ],
)
def test_doctor_knows_torch_versions(version, cuda, level):
    assert doctor._torch({"torch": version, "cuda": cuda, "threads": 2}, "").level == level


def test_tokenize_and_detokenize(clip, tmp_path, capsys):
    assert run_here("tokenize", clip, "-o", tmp_path / "clip.tokens", "--size", "32x48", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["frames"], facts["size"], facts["windows"]) == (
        "vidtok/tiny",
        20,
        [32, 48],
        2,
    )
    assert facts["tokens"] == sum(tokens.indices.numel() for tokens in TokenWindows(tmp_path / "clip.tokens"))
    assert run_here("detokenize", tmp_path / "clip.tokens", "-o", tmp_path / "back.mp4") == 0
    assert "20 frames of 32x48" in capsys.readouterr().out
    assert read_video(tmp_path / "back.mp4").video.shape == (3, 20, 32, 48)


def test_other_dtypes_keep_the_weights_name(clip, tmp_path, capsys):
    """The fingerprint is that of the file: tokens made in one dtype decode in another."""
    assert (
        run_here(
            "tokenize",
            clip,
            "-o",
            tmp_path / "a.tokens",
            "--size",
            "16",
            "--dtype",
            "bf16",
            "--device",
            "cpu",
        )
        == 0
    )
    assert TokenWindows(tmp_path / "a.tokens")[0].dtype == torch.bfloat16
    assert run_here("detokenize", tmp_path / "a.tokens", "-o", tmp_path / "a.mp4") == 0
    assert read_video(tmp_path / "a.mp4").video.shape == (3, 20, 16, 20)
    capsys.readouterr()


def test_another_model_for_a_token_file_is_noticed(clip, tmp_path, capsys):
    """Weights of the same shapes, and a configuration of the same shapes."""
    torch.manual_seed(0)
    VidTok("tiny").save(mine := tmp_path / "mine.safetensors")
    assert run_here("tokenize", clip, "-o", tmp_path / "a.tokens", "--size", "16", "--checkpoint", mine) == 0
    detokenize = "detokenize", tmp_path / "a.tokens", "-o", tmp_path / "a.mp4"
    capsys.readouterr()
    assert "made by other weights of vidtok/tiny" in one_line(run_here(*detokenize), capsys.readouterr().err)
    assert not list(tmp_path.glob("a.mp4*"))
    assert run_here(*detokenize, "--any-weights") == 0 and (tmp_path / "a.mp4").is_file()
    assert run_here(*detokenize, "--checkpoint", mine, "--force") == 0

    VTok("tiny").save(tmp_path / "each.safetensors")
    VTok({**VTok("tiny").config.to_dict(), "stride": 4}).save(tmp_path / "fourth.safetensors")
    vtok = (
        "tokenize",
        clip,
        "-o",
        tmp_path / "v.tokens",
        "--size",
        "16",
        "--model",
        "vtok/tiny",
        "--checkpoint",
    )
    assert run_here(*vtok, tmp_path / "each.safetensors") == 0
    capsys.readouterr()
    for command in (
        (*vtok[:3], tmp_path / "w.tokens", *vtok[4:]),
        ("detokenize", tmp_path / "v.tokens", "-o", tmp_path / "v.mp4", "--checkpoint"),
    ):
        said = one_line(run_here(*command, tmp_path / "fourth.safetensors"), capsys.readouterr().err)
        assert "holds vtok/tiny with stride=4; vtok/tiny, which was asked for, has stride=1" in said


def test_an_external_backbone_names_the_way_out(clip, tmp_path, capsys):
    config = {
        "backbone": "external",
        "feature_dim": 4,
        "token_dim": 4,
        "motion_hidden": 4,
        "decoder_dim": 8,
        "decoder_heads": 2,
    }
    VTok(config, backbone=torch.nn.Conv2d(3, 4, 8, 8)).save(tmp_path / "model.safetensors")
    command = (
        "tokenize",
        clip,
        "-o",
        tmp_path / "a.tokens",
        "--model",
        "vtok",
        "--checkpoint",
        tmp_path / "model.safetensors",
    )
    assert "in Python: VTok.from_checkpoint(file, config, backbone=module)" in one_line(
        run_here(*command), capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "32x"], "size='32x'"),
        (["--model", "vidtok/fsq_causal_488_4096"], "checkpoint: vidtok/fsq_causal_488_4096 needs one"),
        (["--model", "vidtok/nope"], "the configurations of vidtok are fsq_causal_488_4096, "),
        (["--model", "nope/tiny"], "the tokenizers are cosmos, infotok, "),
        (["--window", "16"], "window=16"),
        (["--overlap", "17"], "overlap=17"),
        (["--router", "latent"], "router='latent': vidtok models keep all"),
        (["--device", "abacus"], "device='abacus'"),
        (["--dtype", "fp8"], "dtype='fp8'"),
        pytest.param(
            ["--device", "cuda"],
            "device='cuda': there are 0",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_tokenize_refuses_in_one_line(clip, tmp_path, capsys, options, said):
    assert said in one_line(
        run_here("tokenize", clip, "-o", tmp_path / "clip.tokens", *options), capsys.readouterr().err
    )
