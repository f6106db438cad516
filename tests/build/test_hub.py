"""The layout for Hugging Face's `kernels`: it imports under any name, beside other builds, and its layers
have no state."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from vtok_fast import nn as our_nn
from vtok_fast.dispatch import native, tuning

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("hub", ROOT / "scripts" / "hub.py")
hub = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)

ALONE = """
import importlib.util, json, sys
sys.modules["vtok_fast"] = None  # it must not be needed
folder, name = sys.argv[1:]
spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
spec.loader.exec_module(module)
import torch
x, w = torch.randn(1, 4, 3, 8, 8), torch.randn(6, 4, 3, 3, 3)
y = module.causal_conv3d(x, w)
padded = torch.nn.functional.pad(x, (1, 1, 1, 1, 2, 0))
want = torch.nn.functional.conv3d(padded, w)
codes, indices = module.fsq_quantize(torch.randn(1, 3, 2, 4, 4), (8, 5, 5))
module.norm_act(x, torch.ones(4), kind="rms", activation="silu")
packed = module.pack_tokens(x, torch.rand(1, 3, 8, 8) > 0.5)
grad = torch.autograd.grad(module.causal_conv3d(x, w.requires_grad_()).sum(), w)[0]
q = torch.randn(1, 1, 6, 8)
module.scope_attention(q, q, q, module.Scope.block_causal(2, 3))
print(json.dumps({"error": ((y - want).norm() / want.norm()).item(), "gradient": grad.shape == w.shape,
                  "namespaces": [n for n in dir(torch.ops) if "vtok" in n],
                  "backends": module.available_backends()["causal_conv3d"],
                  "absolute": [n for n, m in sys.modules.items() if n.split(".")[0] == "vtok_fast" and m]}))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "repository"
    natives = [Path(native.lib().__file__)] if native.lib() else []
    return folder, hub.write(folder, ["torch-cpu", "torch-cuda", hub.variant_here()], natives)


def test_every_import_is_relative(repository):
    folder, ids = repository
    name = ids["torch-cpu"]
    files = sorted(folder.glob("build/torch-cpu/**/*.py"))
    assert {"__init__.py", "layers.py", "dispatch/native.py", "ops/fsq/__init__.py", "kernels/norm_act.py"} <= {
        str(p.relative_to(folder / "build" / "torch-cpu")) for p in files
    }
    for path in files:
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert all((n or "").split(".")[0] != "vtok_fast" for n in names), path
        assert "vtok_fast::" not in text.replace(f"{name}::", "") and "torch.ops.vtok_fast" not in text, path


@pytest.mark.parametrize("variant", ["torch-cpu", hub.variant_here()])
def test_it_works_without_the_package(repository, tmp_path, variant):
    folder, ids = repository
    name = ids[variant]
    metadata = json.loads((folder / "build" / variant / "metadata.json").read_text())
    assert metadata["id"] == name and metadata["name"] == "vtok-fast" and metadata["version"] == 1
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(folder / "build" / variant), "any_name"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["error"] < 1e-6
        and found["gradient"]
        and found["namespaces"] == [name]
        and not found["absolute"]
    )
    native_here = native.lib() is not None and variant != "torch-cpu"
    assert (found["backends"]["cpu"] is None) == native_here


def test_layers_have_no_state_and_our_forward(repository):
    """What `kernels` checks before it takes a layer; and beside the installed package, in one process."""
    folder, ids = repository
    name = ids[hub.variant_here()]
    spec = importlib.util.spec_from_file_location(name, folder / "build" / hub.variant_here() / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        plain = {n for n, _ in inspect.getmembers(nn.Module)}
        for layer in ("CausalConv3d", "NormAct", "FSQ"):
            ours, theirs = getattr(module.layers, layer), getattr(our_nn, layer)
            assert ours.__init__ is nn.Module.__init__
            assert {n for n, _ in inspect.getmembers(ours)} - plain <= {"can_torch_compile", "has_backward"}
            assert list(inspect.signature(ours.forward).parameters) == list(
                inspect.signature(theirs.forward).parameters
            )
        conv, x = our_nn.CausalConv3d(4, 6, 3), torch.randn(1, 4, 3, 8, 8)
        torch.testing.assert_close(module.layers.CausalConv3d.forward(conv, x), conv(x))
        norm = our_nn.NormAct(4, activation="silu")
        torch.testing.assert_close(module.layers.NormAct.forward(norm, x), norm(x))
    finally:
        for key in [k for k in sys.modules if k.split(".")[0] == name]:
            del sys.modules[key]


def test_every_version_and_variant_has_its_own_id(tmp_path, monkeypatch):
    """Whatever differs between two builds, down to a native module's bytes, is another id."""
    variants = [
        "torch-cpu",
        "torch-cuda",
        "torch213-cxx11-cpu-x86_64-linux",
        "torch-stable-abi26-cu130-x86_64-linux",
    ]
    module = tmp_path / "_C.cpython-311-x86_64-linux-gnu.so"
    module.write_bytes(b"one")
    first = hub.write(tmp_path / "a", variants, [module])
    assert list(first) == variants and len(set(first.values())) == len(variants)
    assert hub.write(tmp_path / "b", variants, [module]) == first
    again = hub.write(tmp_path / "b", variants, [module], version=2)
    assert not set(again.values()) & set(first.values())
    assert json.loads((tmp_path / "b/build/torch-cpu/metadata.json").read_text())["version"] == 2
    module.write_bytes(b"two")
    other = hub.write(tmp_path / "b", variants, [module])
    assert [other[v] != first[v] for v in variants] == [
        False,
        False,
        True,
        True,
    ]  # those that have the module
    text = hub.template
    monkeypatch.setattr(hub, "template", lambda name: text(name) + "# changed\n")
    assert not set(hub.write(tmp_path / "b", variants, [module]).values()) & set(other.values())


def test_the_command_writes_every_variant(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hub.py", str(tmp_path / "out"), "--version", "3"])
    hub.main()
    said, variants = capsys.readouterr(), {path.name for path in (tmp_path / "out" / "build").iterdir()}
    assert variants == {"torch-cpu", "torch-cuda", hub.variant_here()}
    assert all(f"{name}: _vtok_fast_" in said.out for name in variants)
    assert "version=3" in (tmp_path / "out" / "README.md").read_text()
    assert f"{hub.variant_here()}: no native module for Python 3.1" in said.err


@pytest.mark.parametrize(
    "variant",
    [
        "torch",
        "torch-rocm",
        "torch213",
        "torch213-cxx11-cu130",
        "torch213-cxx11-rocm-x86_64-linux",
        "torch-stable-abi-cpu-x86_64-linux",
        "../torch-cpu",
        "torch-cpu-x86_64-linux",
    ],
)
def test_a_variant_that_kernels_would_not_know_is_refused(tmp_path, variant):
    with pytest.raises(ValueError, match="variant: expected torch-cpu, .*got"):
        hub.write(tmp_path / "out", ["torch-cpu", variant], [])
    assert not (tmp_path / "out").exists()


def test_what_would_be_lost_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="folder: .*mine is there"):
        hub.write(tmp_path / "mine", ["torch-cpu"], [])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    with pytest.raises(ValueError, match="version: expected 1 or more, got 0"):
        hub.write(tmp_path / "out", ["torch-cpu"], [], version=0)


def wheel(folder: Path, python: str, inside: str = "{name}") -> Path:
    name = f"vtok_fast/_C.cpython-{python}-x86_64-linux-gnu.so"
    path = folder / f"vtok_fast-0.1.0-cp{python}-cp{python}-manylinux_2_34_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(inside.format(name=name), python)
        archive.writestr("vtok_fast/__init__.py", "")
    return path


def test_one_variant_holds_the_modules_of_every_python(tmp_path, monkeypatch, capsys):
    """Of wheels, as kernels has no name for a variant of one Python; those that are missing are named."""
    wheels = [wheel(tmp_path, python) for python in ("310", "311", "312")]
    command = [
        "hub.py",
        str(tmp_path / "out"),
        "--variant",
        "torch-cpu",
        "--variant",
        "torch-stable-abi26-cu130-x86_64-linux",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--native", *map(str, wheels)])
    hub.main()
    folder = tmp_path / "out" / "build" / "torch-stable-abi26-cu130-x86_64-linux"
    assert {p.name: p.read_text() for p in folder.glob("*.so")} == {
        f"_C.cpython-{p}-x86_64-linux-gnu.so": p for p in ("310", "311", "312")
    }
    assert not list((tmp_path / "out" / "build" / "torch-cpu").glob("*.so"))
    said = capsys.readouterr().err
    assert "no native module for Python 3.13, 3.14," in said and "no CUDA kernels in _C.cpython-310" in said
    monkeypatch.setattr(
        sys, "argv", ["hub.py", str(tmp_path / "out"), "--native", str(wheels[0]), "--native", str(wheels[0])]
    )
    with pytest.raises(SystemExit, match="hub: --native: two modules named _C.cpython-310"):
        hub.main()
    monkeypatch.setattr(
        sys, "argv", ["hub.py", str(tmp_path / "out"), "--native", str(wheel(tmp_path, "313", "other.so"))]
    )
    with pytest.raises(SystemExit, match="cp313.*this wheel has no native module"):
        hub.main()


def test_a_build_without_a_module_for_this_python_says_so(tmp_path):
    """Instead of running every op on its reference in silence; the portable variants never had one."""
    other = tmp_path / "_C.cpython-39-x86_64-linux-gnu.so"
    other.write_text("")
    hub.write(tmp_path / "out", ["torch-cpu", hub.variant_here()], [other])
    for variant, warned in (("torch-cpu", False), (hub.variant_here(), True)):
        done = subprocess.run(
            [sys.executable, "-c", ALONE, str(tmp_path / "out/build" / variant), "any_name"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        said = f"native modules loads in {sys.implementation.cache_tag}: {other.name}; the ops run on"
        assert (said in done.stderr) == warned and done.stderr.count("RuntimeWarning") == warned, done.stderr


# Several builds and the installed package in one process: which code, ops and native module each has.
TOGETHER = """
import importlib.util, json, pathlib, sys
import torch, vtok_fast
from vtok_fast.dispatch import native
facts = {}
for name, folder in json.loads(sys.argv[1]):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    x = torch.randn(1, 3, 2, 4, 4)
    with torch.profiler.profile() as seen:
        got = module.fsq_quantize(x.clone().requires_grad_(), (8, 5, 5))
    assert torch.equal(got.indices, vtok_fast.fsq_quantize(x, (8, 5, 5)).indices)
    facts[f"{name} {folder}"] = {
        "layers": str(pathlib.Path(module.layers.__file__).parent),
        "code": module.fsq_quantize.__code__.co_filename,
        "cpu": module.available_backends()["fsq"]["cpu"],
        "ops": sorted({e.key.split("::")[0] for e in seen.key_averages() if e.key.startswith("_vtok")})}
installed = vtok_fast.fsq_quantize.__code__.co_filename
print(json.dumps({"facts": facts, "native": native.lib() is not None, "installed": installed}))
"""


def together(tmp_path, builds):
    done = subprocess.run(
        [sys.executable, "-c", TOGETHER, json.dumps(builds)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("names", [("id", "id", "id"), ("one", "two", "three"), ("one", "one", "one")])
def test_builds_in_one_process_keep_apart(repository, tmp_path, names):
    """Under their ids, as kernels imports them, under other names, and under one name that is taken again."""
    folder, ids = repository
    builds = [
        (ids[v] if n == "id" else n, str(folder / "build" / v)) for n, v in zip(names, ids, strict=True)
    ]
    found = together(tmp_path, builds)
    for (name, path), (variant, own) in zip(builds, ids.items(), strict=True):
        facts = found["facts"][f"{name} {path}"]
        assert facts["layers"] == path and facts["code"].startswith(path) and facts["ops"] == [own]
        assert (facts["cpu"] is None) == (found["native"] and variant == hub.variant_here())
    assert found["installed"].startswith(str(ROOT))


def test_one_build_under_two_names_and_from_two_folders(repository, tmp_path):
    """torch knows an op's name once per process: the second import shares the first one's code."""
    folder, ids = repository
    shutil.copytree(folder / "build" / "torch-cpu", tmp_path / "another_place")
    first = str(folder / "build" / "torch-cpu")
    builds = [("one", first), ("two", first), ("three", str(tmp_path / "another_place"))]
    found = together(tmp_path, builds)["facts"]
    assert len(found) == 3 and all(
        facts["layers"] == first and facts["ops"] == [ids["torch-cpu"]] for facts in found.values()
    )


def test_tuned_tables_come_along_where_the_dispatcher_looks(tmp_path, monkeypatch):
    plain = hub.write(tmp_path / "a", ["torch-cpu"], [])
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "some_gpu.json").write_text("{}")
    monkeypatch.setattr(hub, "TABLES", tmp_path / "tables")
    assert hub.write(tmp_path / "a", ["torch-cpu"], []) != plain
    folder = tmp_path / "a" / "build" / "torch-cpu"
    assert (folder / "dispatch" / "tuning.py").is_file() and (
        folder / "dispatch" / tuning.SHIPPED.name / "some_gpu.json"
    ).is_file()


def with_kernels(code: str, tmp_path: Path, *words: str, **variables: str) -> str:
    """What a program prints that imports the real package (in a folder of its own: the source's folder
    kernels has the same name)."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("kernels is not installed")
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | variables,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


TWO_VARIANTS = """
import json, pathlib, sys
from kernels import get_loaded_kernels, get_local_kernel
folder = pathlib.Path(sys.argv[1])
a = get_local_kernel(folder / "build" / "torch-cpu", backend="cpu")
b = get_local_kernel(folder)
assert a.fsq_quantize is not b.fsq_quantize
print(json.dumps([[k.metadata.id, k.module.layers.__file__, k.module.available_backends()["fsq"]["cpu"]]
                  for k in get_loaded_kernels()]))
"""


def test_kernels_loads_two_variants_that_keep_apart(repository, tmp_path):
    """The variant of this torch is preferred where it fits; a variant's own folder can be given, too."""
    folder, ids = repository
    loaded = json.loads(with_kernels(TWO_VARIANTS, tmp_path, str(folder)))
    assert [row[0] for row in loaded] == [ids["torch-cpu"], ids[hub.variant_here()]]
    assert [row[1] for row in loaded] == [
        str(folder / "build" / v / "layers.py") for v in ("torch-cpu", hub.variant_here())
    ]
    assert loaded[0][2] is not None and (loaded[1][2] is None) == (native.lib() is not None)


@pytest.mark.parametrize("text", ["README.md", "wheels.md"])
def test_the_lines_for_get_kernel_work(repository, tmp_path, text):
    """Those of the documentation and of the repository's card, with a cache laid out as the Hub's client
    does."""
    page = (repository[0] / "README.md" if text == "README.md" else ROOT / "docs" / "wheels.md").read_text()
    (lines,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "get_kernel" in code)
    commit = "0" * 40
    cache = tmp_path / "cache" / "kernels--you--vtok-fast"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "v1").write_text(commit)
    (cache / "snapshots").mkdir()
    shutil.copytree(repository[0], cache / "snapshots" / commit)
    code = lines + "print(vtok.layers.__file__)"
    said = with_kernels(
        code, tmp_path, HF_HUB_CACHE=str(tmp_path / "cache"), KERNELS_CACHE=str(tmp_path / "cache")
    )
    assert said.split()[-1] == str(cache / "snapshots" / commit / "build" / hub.variant_here() / "layers.py")


def test_what_cannot_be_made_relative_is_refused():
    with pytest.raises(ValueError, match="line 1: write"):
        list(hub.imports(ast.parse("import vtok_fast.ops")))
