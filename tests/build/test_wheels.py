"""scripts/wheels.py: what it would build, what it refuses, and what becomes of a wheel: the folder of its
family, from which pip and uv install it, the same bytes from each build, and a bill of materials. (Building
takes minutes: make wheels, and the slow test here.)"""

from __future__ import annotations

import functools
import http.server
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from vtok_fast.installation import gpus

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location(
    "wheels", Path(__file__).resolve().parents[2] / "scripts" / "wheels.py"
)
wheels = importlib.util.module_from_spec(spec)
sys.modules["wheels"] = wheels  # where its dataclass looks
spec.loader.exec_module(wheels)
wheel_files = sys.modules["wheel_files"]
NAME = "vtok_fast-0.1.0+cu130.sm90a-cp311-cp311-manylinux_2_34_x86_64.whl"


def main(monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["wheels.py", *options])
    return wheels.main()


def test_a_dry_run_lists_the_matrix(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert main(monkeypatch, "--dry-run", "--python", "/a/python3.11", "--python", "/b/python3.12") == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 * len(gpus.FAMILIES) and "/b/python3.12: sm90a: VTOK_FAST_CUDA_ARCHS=90a" in said


def test_gpus_need_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    with pytest.raises(SystemExit, match="--family cpu builds without"):
        main(monkeypatch, "--dry-run", "--python", "/a/python3.11")
    assert main(monkeypatch, "--dry-run", "--python", "/a/python3.11", "--family", "cpu") == 0


def test_the_pythons_at_hand_can_build():
    assert all(Path(path).is_file() for path in wheels.pythons())


def fake(folder: Path, label: str, tag: str = "py3-none-any", extra: dict[str, str] | None = None) -> Path:
    """A wheel as installers see it, without the package."""
    version = f"0.1.0+{label}".rstrip("+")
    info = f"vtok_fast-{version}.dist-info"
    files = {
        "vtok_fast/__init__.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.4\nName: vtok-fast\nVersion: {version}\n"
        "Requires-Python: >=3.10\nLicense-Expression: Apache-2.0\n"
        "Requires-Dist: torch>=2.6\nRequires-Dist: numpy\n"
        'Requires-Dist: av; extra == "demo"\n',
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
    } | (extra or {})
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"vtok_fast-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every family, as `make wheels` leaves it."""
    root = tmp_path_factory.mktemp("dist")
    for archs in gpus.FAMILIES.values():
        wheel = fake(tmp_path_factory.mktemp("raw"), gpus.label(archs))
        wheel_files.publish(wheel, root, 1_700_000_000, {"pybind11": "3.0.1"})
    return root


def pip_takes(*options: str, cwd: Path) -> str:
    """The version that pip would install."""
    command = [sys.executable, "-m", "pip", "--isolated", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--no-index", "--report", "-", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def uv_takes(*options: str, cwd: Path) -> str:
    """The version that uv would install."""
    try:
        importlib.metadata.version("uv")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("uv is not installed")
    *options, name = options
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-config",
        "--no-deps",
        "--no-index",
    ]
    command += ["--no-header", "--no-annotate", "-", *options]
    done = subprocess.run(command, input=name, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("==")[1].strip()


@pytest.fixture(scope="module")
def served(published):
    """The same folders on a web server."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(published))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("installer", [pip_takes, uv_takes])
@pytest.mark.parametrize("family", gpus.FAMILIES)
def test_a_familys_folder_gives_that_family(published, served, family, installer):
    """On whatever machine, from the folder itself and from a web server."""
    label = gpus.label(gpus.FAMILIES[family])
    folder = f"{gpus.CUDA}-{family}" if label else family
    want = f"0.1.0+{label}".rstrip("+")
    assert installer("--find-links", folder, "vtok-fast", cwd=published) == want
    assert installer("--find-links", f"{served}/{folder}/index.html", "vtok-fast", cwd=published) == want


@pytest.mark.parametrize("gpu", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_line_that_a_warning_gives_installs_the_right_wheel(published, gpu):
    """As it stands, beside the folders, whatever is installed so far."""
    command, _, build = gpus.install(gpu, ["75"], "0.1.0+cu130.sm75").partition("   or, ")
    program, verb, *options = shlex.split(command)
    assert (program, verb) == ("pip", "install") and "VTOK_FAST_CUDA_ARCHS=" in build
    took = pip_takes(*options, cwd=published)
    archs = [arch.removeprefix("sm") for arch in took.split(".sm")[1:]]
    assert gpus.code_for(gpu, archs).startswith("sm_")


def test_each_family_has_its_line_in_the_documentation(published):
    page = (ROOT / "docs" / "wheels.md").read_text()
    lines = re.findall(r"`pip install (--find-links \S+ vtok-fast==\S+)`", page)
    took = {line.split()[1]: pip_takes(*line.split(), cwd=published) for line in lines}
    assert took == {
        f.name: next(f.glob("*.whl")).name.split("-")[1] for f in published.iterdir() if f.is_dir()
    }


@pytest.mark.parametrize(
    ("wheel", "folder"),
    [
        ("vtok_fast-0.1.0-cp311-cp311-manylinux_2_34_x86_64.whl", "cpu"),
        (NAME, "cu130-sm90a"),
        ("vtok_fast-1.2+cu131.sm80.sm89-cp311-cp311-linux_x86_64.whl", "cu131-sm80-89"),
        ("vtok_fast-0.1.0+cu130.sm86.sm120-cp311-cp311-linux_x86_64.whl", "cu130-sm86-sm120"),
    ],
)
def test_a_list_that_is_not_a_family_has_a_folder_of_its_own(wheel, folder):
    assert wheel_files.folder_for(wheel) == folder


@pytest.mark.parametrize("name", ["other-0.1.0-py3-none-any.whl", "vtok_fast-0.1.0.tar.gz"])
def test_another_file_is_refused(name):
    with pytest.raises(ValueError, match="wheel: expected a file such as"):
        wheel_files.folder_for(name)


def test_check_sums_and_bill_of_materials_lie_beside_a_wheel(published):
    for folder in published.iterdir():
        (wheel,) = folder.glob("*.whl")
        assert {p.name for p in folder.iterdir()} == {
            wheel.name,
            f"{wheel.stem}.cdx.json",
            "index.html",
            "SHA256SUMS",
        }
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
        assert len((folder / "SHA256SUMS").read_text().splitlines()) == 2
        bill = json.loads((folder / f"{wheel.stem}.cdx.json").read_text())
        about = bill["metadata"]["component"]
        assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
        assert about["version"] == wheel.name.split("-")[1] and about["hashes"][0][
            "content"
        ] == wheel_files.digest(wheel)
        assert {part["name"]: part.get("version") for part in bill["components"]} == {
            "pybind11": "3.0.1", "numpy": None, "torch": None}  # fmt: skip
        (graph,) = bill["dependencies"]
        assert graph["dependsOn"] == [part["bom-ref"] for part in bill["components"]]


def test_a_wheel_for_gpus_lists_the_cuda_runtime():
    said = "vtok-fast: _C.so for cu130.sm90a: 11.5 MB in 9 s\nvtok-fast: with pybind11 3.0.1\n"
    assert wheels.built_in(said, NAME) == {"pybind11": "3.0.1", "cuda-cudart": "13.0"}
    assert wheels.built_in(said, "vtok_fast-0.1.0-cp311-cp311-linux_x86_64.whl") == {"pybind11": "3.0.1"}


def test_the_same_files_make_the_same_wheel(tmp_path):
    """Whatever their order, dates and permissions; the module stays executable, and pip installs it."""
    wheel = fake(tmp_path / "a", "", extra={"vtok_fast/_C.so": "machine code", "vtok_fast/data.txt": "text"})
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    results = []
    for seed in range(3):
        random.seed(seed)
        names = random.sample(sorted(files), len(files))
        path = tmp_path / str(seed) / wheel.name
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w", random.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name in names:
                entry = zipfile.ZipInfo(name, (2000 + seed, 1, 1, 0, 0, 0))
                entry.external_attr = (
                    0o100755 if name.endswith(".so") else random.choice([0o100600, 0o100664])
                ) << 16
                content = files[name]
                if name.endswith("RECORD"):
                    content = b"".join(random.sample(content.splitlines(True), len(names)))
                archive.writestr(entry, content)
            if seed:
                archive.writestr("vtok_fast/", b"")
        wheel_files.normalize(path, 1_700_000_000)
        results.append(path.read_bytes())
    assert len(set(results)) == 1
    with zipfile.ZipFile(path) as archive:
        assert {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")} == {
            name: content for name, content in files.items() if not name.endswith("RECORD")}  # fmt: skip
        assert archive.getinfo("vtok_fast/_C.so").external_attr >> 16 == 0o100755
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}
    assert pip_takes(str(path), cwd=tmp_path) == "0.1.0"
    wheel_files.normalize(path, 0)  # a zip file has no date before 1980


def test_the_date_is_given_or_the_commits(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert wheels.epoch() == 1_700_000_000
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    monkeypatch.setattr(wheels, "run", lambda *words: "1600000000\n" if "git" in words else "")
    assert wheels.epoch() == 1_600_000_000

    def no_repository(*words):
        raise RuntimeError("not a git repository")

    monkeypatch.setattr(wheels, "run", no_repository)
    assert wheels.epoch() == 315_532_800


@pytest.mark.parametrize("listed", ["vtok_fast/_C.cpython-311.so", "vtok_fast.libs/libgomp-abc.so.1"])
def test_a_wheel_that_needed_libraries_is_refused(monkeypatch, tmp_path, listed):
    asked = []

    def run(*command, **variables):
        words = [str(word) for word in command]
        asked.append((words, variables))
        if "--outdir" in words:
            fake(tmp_path / "raw", "cu130.sm90a", "cp311-cp311-linux_x86_64")
        if "repair" in words:
            module = {"vtok_fast/_C.so": "machine code"}
            fake(tmp_path / "raw" / "repaired", "cu130.sm90a", "cp311-cp311-manylinux_2_34_x86_64", module)
        return listed if "zipfile" in words else "vtok-fast: built\n"

    monkeypatch.setattr(wheels, "WORK", tmp_path)
    monkeypatch.setattr(wheels, "run", run)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    if "libs" in listed:
        with pytest.raises(RuntimeError, match="had to copy libraries"):
            wheels.build(Path("/t/bin/python"), tmp_path, "sm90a", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    built = wheels.build(Path("/t/bin/python"), tmp_path, "sm90a", tmp_path / "out")
    wheel = tmp_path / "out" / "cu130-sm90a" / NAME
    assert (built.wheel, built.python, built.module) == (NAME, "3.11", len("machine code"))
    assert built.size == wheel.stat().st_size
    assert asked[0][1] == {"VTOK_FAST_CUDA_ARCHS": "90a", "SOURCE_DATE_EPOCH": "1700000000"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a check-out")
def test_a_run_replaces_what_it_built_again(tmp_path):
    """And keeps the others; the commit is the one that it began with."""
    file, about = tmp_path / "wheels.json", wheels.circumstances("beside other work")
    one, two = (wheels.Built(f"{name}.whl", "cpu", "3.11", 5_000_000, 3_000_000, 60, 30) for name in "ab")
    wheels.record(file, [one, two], about)
    wheels.record(file, [wheels.Built("b.whl", "cpu", "3.11", 5_000_000, 3_000_000, 50, 20)], about)
    rows = json.loads(file.read_text())["wheels"]
    assert [(row["wheel"], row["seconds"], row["note"]) for row in rows] == [
        ("a.whl", 60, "beside other work"), ("b.whl", 50, "beside other work")]  # fmt: skip
    assert all(row["commit"] == about["commit"] for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is not a check-out")
def test_two_builds_in_different_folders_have_the_same_bytes(tmp_path):
    """Of one source, without ccache, which would hand the second build the first one's objects."""
    python = next(iter(wheels.pythons()), None)
    assert python is not None, "no Python with headers on PATH"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    places = tmp_path / "one", tmp_path / "another" / "place of a longer name"
    for place in places:  # both before the first build, which takes a while
        for name in filter(None, tracked.split("\0")):
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, place / name)
    built = []
    for place in places:
        command = [
            sys.executable,
            "scripts/wheels.py",
            "--family",
            "cpu",
            "--no-test",
            "--python",
            python,
            "--out",
            "dist",
        ]
        clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXXFLAGS")}
        clean |= {"SOURCE_DATE_EPOCH": "1700000000", "CCACHE_DISABLE": "1"}
        done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=clean)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = (place / "dist" / "cpu").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (module,) = (archive.read(name) for name in archive.namelist() if name.endswith(".so"))
        for folder in (str(place), "build-env-", str(Path(python).parents[1])):
            assert folder.encode() not in module, f"the module names {folder}"
        built.append(place / "dist" / "cpu")
    for first, second in zip(*(sorted(folder.iterdir()) for folder in built), strict=True):
        assert first.name == second.name and first.read_bytes() == second.read_bytes(), first.name


def test_a_command_that_fails_shows_what_it_said():
    with pytest.raises(RuntimeError, match="some reason"):
        wheels.run(sys.executable, "-c", "print('some reason'); raise SystemExit(3)")
